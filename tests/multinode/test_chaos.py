"""A short run of bench/chaos.py: random faults change no token."""

from __future__ import annotations

from faults.chaos import run_chaos
from faults.hosts import Network
from helpers.tiny_models import TinyModel


def test_random_faults_change_no_token(network: Network, model: TinyModel) -> None:
    report = run_chaos(
        network,
        str(model.path),
        "P2 S0 E6 D1",
        minutes=0,
        faults=("kill", "coordinator", "stop"),
        spares=1,
        max_tokens=200,
    )
    assert report.failed == []
    assert (report.lost, report.doubled, report.wrong) == (0, 0, 0)
    assert {injected.fault for injected in report.faults} == {"kill", "coordinator", "stop"}
    assert report.compared > 1000
