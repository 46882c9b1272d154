"""Asks the actors of a pool until every rank has one that answers, replacing those that do not.

Who becomes which rank, and whom to wait for, is coordinator/rank_matching.py's decision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cqil_dist.coordinator.lifecycle import Event, Lifecycle
from cqil_dist.coordinator.pool_member import PoolMember, read_answers, replace_stuck
from cqil_dist.coordinator.rank_matching import (
    MemberView,
    check_enough_actors,
    match_or_wait,
    unmatched,
)
from cqil_dist.rank.mesh_spec import ActorState
from cqil_dist.rank.spec import EngineSpec

_POLL_S = 0.05
# An actor that has answered before and does not within this long is stuck, or its node is cut off.
_ANSWER_S = 1.0


@dataclass(frozen=True)
class MatchedRank:
    """The handle of the actor that is to be a rank, and what the actor last said of itself."""

    actor: Any
    state: ActorState


class RankFinder:
    """The match between the ranks of a launch and the actors of its pool.

    Args:
        members: the pool's, in an order that stays.
        check_open: raises where the pool has been stopped.

    Attributes:
        waiting_for: the ranks that wait for an actor, with their nodes; empty where none does.
    """

    def __init__(
        self, members: Sequence[PoolMember], spec: EngineSpec, check_open: Callable[[], None]
    ) -> None:
        self._members = members
        self._spec = spec
        self._check_open = check_open
        self._indices: dict[int, int] = {}
        self.waiting_for = ""

    def member(self, rank: int) -> PoolMember:
        """Return the actor that was matched with a rank last."""
        return self._members[self._indices[rank]]

    def spares(self) -> list[PoolMember]:
        """Return the actors without a rank that may have one yet; none before the first match."""
        matched = self._indices.values()
        spares = [m for index, m in enumerate(self._members) if matched and index not in matched]
        return [spare for spare in spares if spare.lifecycle is not Lifecycle.GONE]

    def match(self, deadline: float) -> list[MatchedRank]:
        """Find an actor that answers for every rank; returns them in the order of ranks.

        Args:
            deadline: when to give up, by the monotonic clock.

        Raises:
            RankUnavailable: there are too few actors, or were until the deadline.
            ModelError: too few of them can read the model.
            LaunchError: the pool has been stopped.
        """
        started = time.monotonic()
        for member in self._members:
            member.note(Event.UNPREPARED)
            if member.lifecycle is not Lifecycle.GONE:
                member.ask()
        while True:
            read_answers(self._members)
            views = [member.view() for member in self._members]
            waited_s = time.monotonic() - started
            ranks = match_or_wait(self._spec.world, views, self._indices, waited_s)
            if ranks is not None:
                return self._adopt(ranks)
            self._wait(views, deadline)

    def _adopt(self, ranks: dict[int, int]) -> list[MatchedRank]:
        """Take a match; actors that were ranks and do not answer have their processes replaced."""
        for rank in sorted(self._indices):
            if self.member(rank).view().is_silent:
                self.member(rank).replace_silent()
        self._indices = ranks
        self.waiting_for = ""
        return [self._matched(self.member(rank)) for rank in range(self._spec.world)]

    def _matched(self, member: PoolMember) -> MatchedRank:
        assert member.state is not None, "only actors that have answered are matched"
        return MatchedRank(member.actor, member.state)

    def _wait(self, views: Sequence[MemberView], deadline: float) -> None:
        replace_stuck(self._members, _ANSWER_S)
        world, timeout_s = self._spec.world, self._spec.engine.recovery_timeout_s
        self.waiting_for = unmatched(world, views, self._indices)
        self._check_open()
        check_enough_actors(world, views, self.waiting_for, time.monotonic() > deadline, timeout_s)
        time.sleep(_POLL_S)
