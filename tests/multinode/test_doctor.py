"""`cqil doctor` over several nodes, which names each thing that is not well."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from faults.hosts import Network
from helpers.nodes import PLAN
from helpers.tiny_models import TinyModel


def doctor(network: Network, *words: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run(
        network.hosts[0].command("cqil", "doctor", "--address", "auto", "--json", *words),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    findings: list[dict[str, Any]] = report["findings"]
    assert report["failures"] == sum(finding["verdict"] == "failure" for finding in findings)
    return done.returncode, findings


def failures(findings: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    return {
        (finding["where"], finding["check"]): finding["detail"]
        for finding in findings
        if finding["verdict"] == "failure"
    }


def test_a_cluster_that_is_well(network: Network, model: TinyModel) -> None:
    """Every node and every link, in both directions, is reported to be well."""
    code, findings = doctor(
        network, "--model", str(model.path), "--plan", PLAN, "--strategy", "STRICT_SPREAD"
    )
    assert (code, failures(findings)) == (0, {})
    addresses = [host.address for host in network.hosts]
    for check, asked in (
        ("versions", addresses),
        ("model", addresses),  # the head has no room for ranks, but starts them
        ("memory", addresses[1:]),
    ):
        assert {f["where"] for f in findings if f["check"] == check} == set(asked)
    links = {f["where"]: f["detail"] for f in findings if f["check"] == "link"}
    assert links.keys() == {f"{a} -> {b}" for a in addresses for b in addresses if a != b}
    assert all("us" in detail and "MB/s" in detail for detail in links.values())


def test_each_trouble_is_named_with_its_place(network: Network, model: TinyModel) -> None:
    head, first, second, third = network.hosts
    private = f"/dev/shm/doctor_{model.path.name}"
    head.run("cp", "-r", str(model.path), private)
    first.run("ip", "route", "add", "blackhole", second.address)
    try:
        code, findings = doctor(
            network,
            "--model",
            private,
            "--ranks",
            "4",
            "--strategy",
            "STRICT_SPREAD",
            "--slots",
            "100000",
        )
    finally:
        first.run("ip", "route", "del", "blackhole", second.address)
    assert code == 1
    assert failures(findings).keys() == {
        ("cluster", "resources"),
        *((host.address, "memory") for host in (first, second, third)),
        *((host.address, "model") for host in (first, second, third)),
        (f"{first.address} -> {second.address}", "link"),
        (f"{second.address} -> {first.address}", "link"),
    }
