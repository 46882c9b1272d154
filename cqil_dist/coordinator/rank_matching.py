"""Decides which actor becomes which rank, whom to wait for, and when to give up.

Plain values and decisions; coordinator/rank_finder.py asks the actors and replaces processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cqil_dist.coordinator.lifecycle import Lifecycle, Unfit, has_answered, may_become_rank
from cqil_dist.errors import RankUnavailable

# An actor whose connection is closed may have lost its peers only, and answers soon.
_GRACE_S = 0.3


@dataclass(frozen=True)
class MemberView:
    """One actor of the pool at one moment, as far as matching needs to know it.

    Attributes:
        held: the ranks whose weights it holds; None while it has not answered.
        address: its node's, when it last answered.
    """

    state: Lifecycle | Unfit
    held: frozenset[int] | None
    address: str

    @property
    def is_silent(self) -> bool:
        """Return whether it has answered before, but not now."""
        return self.held is None and has_answered(self.state)


def match_or_wait(
    world: int, members: Sequence[MemberView], previous: Mapping[int, int], waited_s: float
) -> dict[int, int] | None:
    """Choose the actor that becomes each rank; None where actors are worth waiting for.

    All are given a moment to answer. Then those that have answered before are waited for if weights
    would have to be read that they may hold. Else others become their ranks.

    Args:
        previous: the index of the actor that was each rank, where there was one.
        waited_s: seconds since the actors were asked.
    """
    held = _held(members)
    missing = [m for m in members if m.held is None and may_become_rank(m.state)]
    ranks = match_ranks(world, held, previous)
    if ranks is None or (missing and waited_s < _GRACE_S):
        return None
    all_loaded = all(rank in held[index] for rank, index in ranks.items())
    return ranks if all_loaded or not any(m.is_silent for m in missing) else None


def match_ranks(
    world: int, held: Mapping[int, frozenset[int]], previous: Mapping[int, int]
) -> dict[int, int] | None:
    """Choose the actor that becomes each rank; None where there are fewer actors than ranks.

    A rank goes to an actor that holds its weights: the one that had it before, else the one that
    holds the fewest others. What is left over goes first to the actors that had those ranks.

    Args:
        held: the ranks whose weights each actor that answers holds, by the actor's index.
        previous: the index of the actor that was each rank, where there was one.
    """
    if len(held) < world:
        return None
    ranks: dict[int, int] = {}

    def match(rank: int, indices: Iterable[int]) -> None:
        free = [index for index in indices if index not in ranks.values()]
        if rank not in ranks and free:
            ranks[rank] = min(free, key=lambda i: (i != previous.get(rank), len(held[i]), i))

    for rank in range(world):
        match(rank, [index for index, own in held.items() if rank in own])
    for rank in range(world):
        match(rank, [previous[rank]] if previous.get(rank) in held else [])
    for rank in range(world):
        match(rank, held)
    return ranks


def unmatched(world: int, members: Sequence[MemberView], previous: Mapping[int, int]) -> str:
    """Name the ranks without an actor: each with the node it was on, or those that nobody holds."""
    held = _held(members)
    lost = [
        f"rank {rank} (was on {members[index].address})"
        for rank, index in sorted(previous.items())
        if index not in held
    ]
    loaded = frozenset[int]().union(*held.values())
    return ", ".join(lost or [f"rank {rank}" for rank in range(world) if rank not in loaded])


def check_enough_actors(
    world: int, members: Sequence[MemberView], waiting_for: str, is_over: bool, timeout_s: float
) -> None:
    """Raise why to give up, where there are too few actors and waiting for more is no use.

    Args:
        waiting_for: the ranks without an actor.
        is_over: whether the time of `timeout_s` seconds for finding actors has passed.

    Raises:
        ModelError: too few actors can read the model.
        RankUnavailable: too few can ever answer, or have answered in time.
    """
    unfit = [member.state.reason for member in members if isinstance(member.state, Unfit)]
    if unfit and sum(may_become_rank(member.state) for member in members) < world:
        raise unfit[0]
    living = sum(member.state is not Lifecycle.GONE for member in members)
    if is_over or living < world:
        raise RankUnavailable(
            f"no actor for {waiting_for} within {timeout_s:g} s: {len(_held(members))} of "
            f"{len(members)} actors answer and {world} are needed; add a node, or launch again "
            "with fewer ranks"
        )


def _held(members: Sequence[MemberView]) -> dict[int, frozenset[int]]:
    """Ranks held by each actor that answers and may become a rank, by the actor's index."""
    return {
        index: member.held
        for index, member in enumerate(members)
        if member.held is not None and may_become_rank(member.state)
    }
