"""Launches that fail: each ends with an error that names what is missing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from faults.hosts import Network
from faults.remote import RemoteEngine
from helpers.nodes import SAMPLINGS, host_of, launch, stream
from helpers.tiny_models import TinyModel

import cqil_dist as cqil


def test_giving_up_names_the_rank_and_its_node(network: Network, model: TinyModel) -> None:
    """Three ranks fill the nodes, so that a lost one has no other to move to."""
    network.start_ray()
    with launch(network, model.path, ranks=3, recovery_timeout_s=4) as engine:
        running = [stream(engine, sampling).read(tokens=20) for sampling in SAMPLINGS]
        lost = engine.status()["ranks"][1]
        host = host_of(network, lost)
        host.kill_ray()
        started = time.monotonic()
        for waiting in running:
            with pytest.raises(cqil.CqilError, match=rf"rank 1 \(was on {host.address}\)"):
                waiting.read()
        assert time.monotonic() - started < 20
        with pytest.raises(cqil.CqilError, match="rank 1"):
            stream(engine, SAMPLINGS[0]).read()
        assert engine.status()["state"] == "failed"
    network.start_ray()


def test_a_node_without_the_model_is_named(network: Network, model: TinyModel) -> None:
    """The model is on the head alone."""
    head = network.hosts[0]
    private = f"/dev/shm/{model.path.name}_model"
    head.run("cp", "-r", str(model.path), private)
    message = rf"ModelNotFound: node 10\.77\.0\.[2-4] has no directory {private}"
    with pytest.raises(cqil.CqilError, match=message):
        RemoteEngine(head, model=private, ranks=1, address="auto")


def test_a_spare_stands_in_for_a_node_without_the_model(network: Network, model: TinyModel) -> None:
    """Wherever ranks are placed first, they end up on the nodes that can read the model."""
    head, first, _, third = network.hosts
    private = f"/dev/shm/{model.path.name}_on_two"
    for host in (head, first, third):
        host.run("cp", "-r", str(model.path), private)
    with launch(network, Path(private), spares=1) as engine:
        ranks = engine.status()["ranks"]
        assert {rank["address"] for rank in ranks} == {first.address, third.address}
        assert len(stream(engine, SAMPLINGS[0], tokens=5).read().token_ids) == 5


def test_more_spread_ranks_than_nodes_are_refused(network: Network, model: TinyModel) -> None:
    with pytest.raises(cqil.CqilError, match=r"InsufficientResources: asked for 4 ranks.*3 CPU"):
        launch(network, model.path, ranks=4)
