"""Connects the actors of one epoch: each rank with each other, and the coordinator with all.

Knows which actor is which rank; how that was decided is coordinator/rank_matching.py's affair.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from cqil_dist.coordinator.node_addresses import host_addresses
from cqil_dist.errors import CqilError, ExchangeError, LaunchError
from cqil_dist.exchange.handshake import COORDINATOR
from cqil_dist.exchange.link import Link
from cqil_dist.exchange.listener import connect
from cqil_dist.rank.mesh_spec import ActorState, MeshSpec
from cqil_dist.rank.spec import EngineSpec
from cqil_dist.status import RankStatus

_CALL_TIMEOUT_S = 60.0
_JOIN_DEADLINE_S = 20.0

# A core that sleeps takes tens of microseconds to wake, and runs its first layer a third slower.
# A rank with cores to itself may poll for as long as a peer's run of layers takes; one that
# shares them, only for as long as an exchange.
_SPIN_PINNED_S = 0.02
_SPIN_S = 0.0005


@dataclass(frozen=True)
class ConnectedRanks:
    """The ranks of one epoch.

    Attributes:
        links: from the coordinator to rank 0, 1, ...
        actors: their handles.
    """

    epoch: int
    links: tuple[Link, ...]
    actors: tuple[Any, ...]
    descriptions: tuple[RankStatus, ...]


class ActorFailed(Exception):
    """An actor raised what nothing of ours raises: its process may be past use.

    Attributes:
        rank: that it was to be.
    """

    def __init__(self, rank: int, error: Exception) -> None:
        super().__init__(f"rank {rank}: {type(error).__name__}: {error}")
        self.rank = rank


def connect_ranks(
    spec: EngineSpec, secret: bytes, actors: Sequence[Any], states: Mapping[int, ActorState]
) -> ConnectedRanks:
    """Have all listen in the next epoch, connect, and serve.

    Args:
        actors: handles of rank 0, 1, ..., which hold their weights.
        states: theirs.

    Raises:
        ExchangeError: they did not all meet; nothing of ours is left open.
        LaunchError: cores cannot be bound as asked.
        ActorFailed: one of them can do nothing.
    """
    world = len(actors)
    epoch = 1 + max(state.epoch for state in states.values())
    addresses_of = host_addresses()
    if gone := [rank for rank, state in states.items() if state.node_id not in addresses_of]:
        raise ExchangeError(f"the nodes of ranks {gone} are gone")
    hosts = [addresses_of[states[rank].node_id] for rank in range(world)]
    listening = [
        actor.listen.remote(host, secret, epoch) for actor, host in zip(actors, hosts, strict=True)
    ]
    addresses = dict(enumerate(_results(listening)))
    nccl_address = None
    own_gpus = {(state.node_id, state.gpu) for state in states.values()}
    if spec.on_gpu and 1 < world == len(own_gpus):
        (nccl_address,) = _results([actors[0].free_address.remote(hosts[0])])
    cores = _cores(spec, states)
    bound = cores is not None and spec.pin != "never"
    idle_spin_s = 0.0 if cores is None else _SPIN_S
    joining = [
        actor.join.remote(
            spec,
            MeshSpec(
                rank=rank,
                addresses=addresses,
                secret=secret,
                epoch=epoch,
                nccl_address=nccl_address,
                cores=cores[rank] if cores is not None and bound else (),
                spin_s=_SPIN_PINNED_S if bound else idle_spin_s,
                deadline_s=_JOIN_DEADLINE_S,
            ),
        )
        for rank, actor in enumerate(actors)
    ]
    links: list[Link] = []
    try:
        for rank, address in addresses.items():
            sock = connect(address, COORDINATOR, rank, secret, epoch, _JOIN_DEADLINE_S)
            links.append(Link(sock, rank, address, spec.max_message_bytes, spec.step_deadline_s))
        sizes = _results(joining)
    except BaseException:
        for link in links:
            link.close()
        raise
    descriptions = tuple(
        RankStatus(
            rank=rank,
            node_id=states[rank].node_id,
            address=hosts[rank],
            pid=states[rank].pid,
            device="cuda" if spec.on_gpu else "cpu",
            **sizes[rank],
        )
        for rank in range(world)
    )
    return ConnectedRanks(epoch, tuple(links), tuple(actors), descriptions)


def _cores(spec: EngineSpec, states: Mapping[int, ActorState]) -> list[tuple[int, ...]] | None:
    """Cores of each rank, none shared on a node; None where a node has not enough of them."""
    taken: Counter[str] = Counter()
    cores: list[tuple[int, ...]] = []
    for rank in range(len(states)):
        state = states[rank]
        first = taken[state.node_id]
        cores.append(state.cores[first : first + spec.threads])
        taken[state.node_id] += spec.threads
    if all(len(own) == spec.threads for own in cores):
        return cores
    if spec.pin == "always":
        raise LaunchError(
            f"pin asks for {spec.threads} cores a rank, but a node has fewer than its ranks need; "
            "launch fewer ranks or threads, or without pin"
        )
    return None


def _results(calls: list[Any]) -> list[Any]:
    """What the calls of rank 0, 1, ... return. Raises the first error as soon as it comes."""
    deadline = time.monotonic() + _CALL_TIMEOUT_S
    waiting = calls
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise GetTimeoutError(
                f"{len(waiting)} actors did not answer within {_CALL_TIMEOUT_S:g} s"
            )
        for call in done:
            check_call(call, calls.index(call))
    results: list[Any] = ray.get(calls)
    return results


def check_call(call: Any, rank: int) -> None:
    """Raise what a finished call raised, if it did: one of ours as it is, else ActorFailed."""
    try:
        ray.get(call)
    except RayTaskError as error:
        raised = as_raised(error)
        if isinstance(raised, CqilError):
            raise raised from None
        raise ActorFailed(rank, raised) from error


def as_raised(error: RayTaskError) -> Exception:
    """What an actor's call raised, in its own class."""
    return error.cause if isinstance(error.cause, Exception) else error
