"""Plain values that pass between an actor and whoever has it join a mesh.

Deciding who joins as which rank needs neither Ray nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActorState:
    """An actor's answer to the question what it is.

    Attributes:
        node_id: Ray's id of the node it runs on.
        cores: the CPU cores its process may use.
        gpu: Ray's id of its GPU, or None.
        epoch: the latest epoch it has listened in; -1 before the first.
        ranks: the ranks whose weights it holds.
    """

    node_id: str
    pid: int
    cores: tuple[int, ...]
    gpu: str | None
    epoch: int
    ranks: frozenset[int]


@dataclass(frozen=True)
class MeshSpec:
    """The mesh of one epoch, as one of its ranks is told to join it.

    Attributes:
        rank: the one that is told.
        addresses: each rank's listener, "host:port".
        secret: the launch's, which every connection proves.
        nccl_address: where ranks with a GPU each connect for NCCL; None for partial sums over TCP.
        cores: cores this rank's compute thread is bound to; empty leaves it free.
        spin_s: seconds to poll for a peer's frame before sleeping.
        deadline_s: seconds within which every connection must be there.
    """

    rank: int
    addresses: dict[int, str]
    secret: bytes
    epoch: int
    nccl_address: str | None
    cores: tuple[int, ...]
    spin_s: float
    deadline_s: float
