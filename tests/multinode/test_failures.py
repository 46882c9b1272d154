"""Ranks on nodes of their own, which are killed, cut off and brought back while requests stream."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from faults.hosts import Host, Network
from faults.remote import RemoteEngine, RemoteStream
from helpers.nodes import PLAN, PROMPT, SAMPLINGS, host_of, launch, stream
from helpers.tiny_models import TinyModel
from helpers.watching import wait_for

_EVERYWHERE = ("*", "0.0.0.0", "[::")
_RAY_S_OWN = 1  # every worker of Ray's has one such port, for calls


def test_a_short_cut_ends_where_it_began(network: Network, model: TinyModel) -> None:
    """The cut is too short for Ray to call the node dead; the rank starts anew on it all the same.

    This engine's deadline is shorter than the cut. The engine ends before that of the other tests
    starts, because there is no room for both.
    """
    with launch(network, model.path, step_deadline_s=3) as engine:
        ranks = engine.status()["ranks"]
        kill_idle_nodes(network, ranks)
        undisturbed = read_all(engine)
        host = host_of(network, ranks[1])

        def cut_for_a_while() -> None:
            host.cut()
            try:
                time.sleep(4)
            finally:
                host.restore()

        status = disturb(engine, undisturbed, cut_for_a_while)
        assert status["ranks"][1]["address"] == host.address


def kill_idle_nodes(network: Network, ranks: list[dict[str, Any]]) -> None:
    """Kill the nodes without a rank, so that a rank has no other node to move to."""
    for idle in {host.address for host in network.hosts[1:]} - {r["address"] for r in ranks}:
        network.host_at(idle).kill_ray()


@pytest.fixture(scope="module")
def engine(network: Network, model: TinyModel) -> Iterator[RemoteEngine]:
    network.start_ray()  # the nodes that were killed above
    with launch(network, model.path) as engine:
        yield engine


@pytest.fixture(scope="module")
def undisturbed(engine: RemoteEngine) -> list[RemoteStream]:
    return read_all(engine)


def read_all(engine: RemoteEngine) -> list[RemoteStream]:
    return [stream(engine, sampling).read() for sampling in SAMPLINGS]


def disturb(
    engine: RemoteEngine, undisturbed: list[RemoteStream], fault: Callable[[], None]
) -> dict[str, Any]:
    """Check that a fault does not change the streams, and return the status afterwards."""
    running = [stream(engine, sampling).read(tokens=20) for sampling in SAMPLINGS]
    fault()
    for got, expected in zip(running, undisturbed, strict=True):
        got.read()
        assert got.token_ids == expected.token_ids
        assert got.text == expected.text
    status = engine.status()
    assert status["state"] == "serving"
    return status


def test_ranks_are_on_nodes_of_their_own_and_compute_the_reference(
    network: Network, engine: RemoteEngine, model: TinyModel, undisturbed: list[RemoteStream]
) -> None:
    ranks = engine.status()["ranks"]
    assert len({rank["node_id"] for rank in ranks}) == 2
    addresses = {rank["address"] for rank in ranks}
    assert addresses < {host.address for host in network.hosts[1:]}
    token_ids = undisturbed[0].token_ids
    sequence = [*PROMPT, *token_ids]
    logits = model.reference_logits(model.plan(PLAN), sequence)[len(PROMPT) - 1 : -1]
    assert logits.argmax(-1).tolist() == token_ids


def test_nobody_listens_for_longer_or_wider_than_need_be(
    network: Network, engine: RemoteEngine
) -> None:
    """Ranks listen only while they connect, and the coordinator on its node's address alone."""
    head = network.hosts[0]
    (coordinator,) = head.processes("ray::Coordinator")
    assert {address for address, _ in listening(head, coordinator)} == {head.address}
    assert len(listening_everywhere(head, coordinator)) == _RAY_S_OWN
    for rank in engine.status()["ranks"]:
        assert not listening(host_of(network, rank), rank["pid"])
        assert len(listening_everywhere(host_of(network, rank), rank["pid"])) == _RAY_S_OWN


def listening(host: Host, pid: int) -> list[tuple[str, str]]:
    """The addresses and ports on which a process listens, except on every interface."""
    return [pair for pair in _sockets(host, pid) if pair[0] not in _EVERYWHERE]


def listening_everywhere(host: Host, pid: int) -> list[tuple[str, str]]:
    return [pair for pair in _sockets(host, pid) if pair[0] in _EVERYWHERE]


def _sockets(host: Host, pid: int) -> list[tuple[str, str]]:
    lines = host.run("ss", "-Htlnp").splitlines()
    owned = [line.split()[3] for line in lines if re.search(rf"\bpid={pid}\b", line)]
    split = [address.replace("[::ffff:", "").replace("]", "").rpartition(":") for address in owned]
    return [(host, port) for host, _, port in split]


def test_a_rank_moves_to_a_spare_node_when_its_own_dies(
    network: Network, engine: RemoteEngine, undisturbed: list[RemoteStream]
) -> None:
    kept, lost = engine.status()["ranks"]
    status = disturb(engine, undisturbed, host_of(network, lost).kill_ray)
    assert status["ranks"][0] == kept
    assert status["ranks"][1]["address"] not in (kept["address"], lost["address"])
    assert f"lost rank 1 at {lost['address']}" in status["last_recovery"]["cause"]


def test_a_rank_moves_when_its_node_is_cut_off(
    network: Network, engine: RemoteEngine, undisturbed: list[RemoteStream]
) -> None:
    network.start_ray()
    kept, lost = engine.status()["ranks"]
    host = host_of(network, lost)
    try:
        status = disturb(engine, undisturbed, host.cut)
    finally:
        host.restore()
    assert status["ranks"][0] == kept
    assert status["ranks"][1]["address"] not in (kept["address"], lost["address"])
    wait_for(lambda: not host.processes("ray::LayerActor"), "the rank that was cut off ends")
    host.kill_ray()  # it has been declared dead, and would not find back


def test_the_engine_waits_for_a_node_to_come_back(
    network: Network, engine: RemoteEngine, undisturbed: list[RemoteStream]
) -> None:
    """While no node is left, the status tells what is waited for."""
    ranks = engine.status()["ranks"]
    host = host_of(network, ranks[1])
    kill_idle_nodes(network, ranks)

    def kill_and_bring_back() -> None:
        host.kill_ray()
        wait_for(lambda: engine.status()["state"] == "recovering", "the loss is noticed")
        wait_for(
            lambda: f"rank 1 (was on {host.address})" in engine.status()["state_detail"],
            "the status names the rank and its node",
        )
        host.start_ray(network.hosts[0], cpus=1)

    status = disturb(engine, undisturbed, kill_and_bring_back)
    assert status["ranks"][1]["address"] == host.address


def test_a_flood_of_strangers_disturbs_nobody(
    network: Network, engine: RemoteEngine, undisturbed: list[RemoteStream]
) -> None:
    """Strangers send garbage, huge lengths, half messages or nothing to the coordinator's ports."""
    epoch = engine.status()["epoch"]
    head, stranger = network.hosts[0], network.hosts[-1]
    (coordinator,) = head.processes("ray::Coordinator")
    ports = [port for _, port in listening(head, coordinator)]
    assert len(ports) == 1
    flood = stranger.popen("python", "-c", _FLOOD, head.address, *ports)
    try:
        disturb(engine, undisturbed, lambda: None)
        assert flood.poll() is None
    finally:
        flood.kill()
        flood.wait()
    assert engine.status()["epoch"] == epoch
    assert len(stream(engine, SAMPLINGS[0], tokens=5).read().token_ids) == 5


_FLOOD = """
import os, socket, sys, time
host, *ports = sys.argv[1:]
huge = b"\\xff\\xff\\xff\\x7f" * 2
opening = [b"", b"\\xff" * 64, os.urandom(4096), huge, b"GET / HTTP/1.1\\r\\n"]
held = []
while True:
    for port in ports:
        for data in opening:
            try:
                sock = socket.create_connection((host, int(port)), timeout=1)
                sock.sendall(data)
                held.append(sock)
            except OSError:
                time.sleep(0.01)
    for sock in held[:-300]:
        sock.close()
    held = held[-300:]
    time.sleep(0.005)
"""
