"""Connects the ranks of one epoch: each with each other, and the coordinator with all.

This module knows which actor is which rank; how that was decided is coordinator/rank_matching.py's
affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from cqil_dist.coordinator.actor_calls import results
from cqil_dist.coordinator.core_binding import bind_cores
from cqil_dist.coordinator.node_addresses import host_addresses
from cqil_dist.coordinator.rank_finder import MatchedRank
from cqil_dist.errors import ExchangeError
from cqil_dist.exchange.handshake import COORDINATOR
from cqil_dist.exchange.link import Link
from cqil_dist.exchange.listener import connect
from cqil_dist.rank.mesh_spec import ActorState, MeshSpec
from cqil_dist.rank.spec import EngineSpec
from cqil_dist.status import RankStatus

_JOIN_DEADLINE_S = 20.0


@dataclass(frozen=True)
class ConnectedRanks:
    """The ranks of one epoch.

    Attributes:
        links: the coordinator's connections to rank 0, 1, ...
        actors: the handles of rank 0, 1, ...
        descriptions: what the status says of rank 0, 1, ...
    """

    epoch: int
    links: tuple[Link, ...]
    actors: tuple[Any, ...]
    descriptions: tuple[RankStatus, ...]

    def close(self) -> None:
        """Close the coordinator's connections, whereupon the ranks leave the mesh."""
        for link in self.links:
            link.close()


def connect_ranks(spec: EngineSpec, secret: bytes, ranks: Sequence[MatchedRank]) -> ConnectedRanks:
    """Have all ranks listen in the next epoch, connect, and serve.

    Args:
        secret: the launch's.
        ranks: the actors that are to be rank 0, 1, ...; they hold their weights.

    Raises:
        ExchangeError: not every connection came about; none of the coordinator's is left open.
        LaunchError: cores cannot be bound as asked.
        GetTimeoutError, RayActorError: an actor does not answer, or has ended.
        ActorFailed: an actor raised what is no error of this package.
    """
    actors = [rank.actor for rank in ranks]
    states = [rank.state for rank in ranks]
    epoch = 1 + max(state.epoch for state in states)
    hosts = _hosts(states)
    placed = zip(actors, hosts, strict=True)
    addresses = results([actor.listen.remote(host, secret, epoch) for actor, host in placed])
    nccl_address = _nccl_address(spec, states, actors[0], hosts[0])
    meshes = _mesh_specs(spec, secret, epoch, states, addresses, nccl_address)
    joining = [actor.join.remote(spec, mesh) for actor, mesh in zip(actors, meshes, strict=True)]
    with ExitStack() as on_failure:
        links: list[Link] = []
        for mesh in meshes:
            links.append(_link(spec, mesh))
            on_failure.callback(links[-1].close)
        sizes = results(joining)
        on_failure.pop_all()
    descriptions = _descriptions(spec, states, hosts, sizes)
    return ConnectedRanks(epoch, tuple(links), tuple(actors), descriptions)


def _hosts(states: Sequence[ActorState]) -> list[str]:
    """Find the addresses of the ranks' nodes; raises ExchangeError where a node is gone."""
    addresses = host_addresses()
    if gone := [rank for rank, state in enumerate(states) if state.node_id not in addresses]:
        raise ExchangeError(f"the nodes of ranks {gone} are gone")
    return [addresses[state.node_id] for state in states]


def _nccl_address(
    spec: EngineSpec, states: Sequence[ActorState], first: Any, host: str
) -> str | None:
    """Choose where ranks with a GPU each connect for NCCL, on rank 0's host; None for others."""
    gpus = {(state.node_id, state.gpu) for state in states}
    if not (spec.on_gpu and 1 < len(states) == len(gpus)):
        return None
    address: str
    (address,) = results([first.free_address.remote(host)])
    return address


def _mesh_specs(
    spec: EngineSpec,
    secret: bytes,
    epoch: int,
    states: Sequence[ActorState],
    addresses: Sequence[str],
    nccl_address: str | None,
) -> list[MeshSpec]:
    """Write down what rank 0, 1, ... is told of the epoch's mesh."""
    binding = bind_cores(spec.pin, spec.threads, states)
    return [
        MeshSpec(
            rank=rank,
            addresses=dict(enumerate(addresses)),
            secret=secret,
            epoch=epoch,
            nccl_address=nccl_address,
            cores=cores,
            spin_s=binding.spin_s,
            deadline_s=_JOIN_DEADLINE_S,
        )
        for rank, cores in enumerate(binding.cores)
    ]


def _link(spec: EngineSpec, mesh: MeshSpec) -> Link:
    address = mesh.addresses[mesh.rank]
    sock = connect(
        address, COORDINATOR, mesh.rank, mesh.secret, mesh.epoch, deadline_s=mesh.deadline_s
    )
    return Link(sock, mesh.rank, address, spec.max_message_bytes, spec.engine.step_deadline_s)


def _descriptions(
    spec: EngineSpec,
    states: Sequence[ActorState],
    hosts: Sequence[str],
    sizes: Sequence[dict[str, int]],
) -> tuple[RankStatus, ...]:
    """Write down what the status says of rank 0, 1, ..."""
    return tuple(
        RankStatus(
            rank=rank,
            node_id=state.node_id,
            address=host,
            pid=state.pid,
            device="cuda" if spec.on_gpu else "cpu",
            **size,
        )
        for rank, (state, host, size) in enumerate(zip(states, hosts, sizes, strict=True))
    )
