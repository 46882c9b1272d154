"""Decides which cores each rank's compute thread is bound to, and how long it polls for frames.

Plain values and decisions. A rank binds its thread itself (rank/actor.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cqil_dist.errors import LaunchError
from cqil_dist.rank.mesh_spec import ActorState

# A core that sleeps takes tens of microseconds to wake, and runs its first layer a third slower.
# A rank with cores to itself may poll for as long as a peer's run of layers takes; one that
# shares them, only for as long as an exchange.
_SPIN_PINNED_S = 0.02
_SPIN_S = 0.0005


@dataclass(frozen=True)
class CoreBinding:
    """The use that the ranks of one epoch make of their nodes' cores.

    Attributes:
        cores: those that each rank's thread is bound to; empty leaves it free.
        spin_s: seconds a rank polls for a peer's frame before it sleeps.
    """

    cores: tuple[tuple[int, ...], ...]
    spin_s: float


def bind_cores(pin: str, threads: int, states: Sequence[ActorState]) -> CoreBinding:
    """Choose cores for every rank, none shared on a node; ranks short of cores do not poll.

    Args:
        pin: "never", "always", or "if_possible", which binds where every node has enough cores.
        threads: the cores a rank asks for.
        states: those of the actors that are rank 0, 1, ...

    Raises:
        LaunchError: pin is "always", but a node has too few cores.
    """
    cores = _own_cores(threads, states)
    free = ((),) * len(states)
    if cores is None:
        if pin == "always":
            raise LaunchError(
                f"pin asks for {threads} cores a rank, but a node has fewer than its ranks need; "
                "launch fewer ranks or threads, or without pin"
            )
        return CoreBinding(free, spin_s=0.0)
    if pin == "never":
        return CoreBinding(free, _SPIN_S)
    return CoreBinding(cores, _SPIN_PINNED_S)


def _own_cores(threads: int, states: Sequence[ActorState]) -> tuple[tuple[int, ...], ...] | None:
    """Cores of each rank, none shared on a node; None where a node has not enough of them."""
    taken: Counter[str] = Counter()
    cores: list[tuple[int, ...]] = []
    for state in states:
        first = taken[state.node_id]
        cores.append(state.cores[first : first + threads])
        taken[state.node_id] += threads
    return tuple(cores) if all(len(own) == threads for own in cores) else None
