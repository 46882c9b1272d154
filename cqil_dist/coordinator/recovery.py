"""Brings the ranks together, out of a pool of actors: at launch, and after any loss.

Launching and recovering are one procedure. Ranks whose actors are alive and hold their weights
keep them; the others go to whatever actor answers (one that Ray has started again, or a spare) and
load. Then all listen in the next epoch, connect, and serve. If another is lost meanwhile, it
starts over, until the deadline.

    rank_finder    an actor for every rank        decided by lifecycle and rank_matching
    rank_loading   its weights
    rendezvous     its connections                core_binding
    spare_keeper   weights for the actors left    failure_reactions
    (here)         once more, or not              failure_reactions
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError

from cqil_dist.coordinator.actor_calls import ActorFailed
from cqil_dist.coordinator.failure_reactions import Failure, Reaction, gives_up, reaction_to
from cqil_dist.coordinator.lifecycle import Event, Lifecycle
from cqil_dist.coordinator.pool_member import PoolMember
from cqil_dist.coordinator.rank_finder import RankFinder
from cqil_dist.coordinator.rank_loading import load_weights
from cqil_dist.coordinator.rendezvous import ConnectedRanks, connect_ranks
from cqil_dist.coordinator.spare_keeper import look_after_spares
from cqil_dist.errors import CqilError, ExchangeError, LaunchError, ModelError, RankUnavailable
from cqil_dist.rank.spec import EngineSpec

logger = logging.getLogger(__name__)

_RETRY_S = 0.2
_SPARES_S = 1.0


class RankPool:
    """The actors of a launch, spare ones included, as its coordinator sees them.

    Args:
        actors: handles of at least as many `LayerActor`s as there are ranks.
        secret: the launch's.
    """

    def __init__(self, actors: Sequence[Any], spec: EngineSpec, secret: bytes) -> None:
        self._members = [PoolMember(actor) for actor in actors]
        self._spec = spec
        self._secret = secret
        self._stopping = threading.Event()
        self._finder = RankFinder(self._members, spec, self._check_open)
        self._using_members = threading.Lock()
        if len(actors) > spec.world:
            threading.Thread(target=self._keep_spares, name="spares", daemon=True).start()

    @property
    def waiting_for(self) -> str:
        """The ranks that wait for an actor, with the nodes they were on; empty where none does."""
        return self._finder.waiting_for

    def ready_spares(self) -> int:
        """Count the actors without a rank that hold the weights of all of them."""
        return sum(member.lifecycle is Lifecycle.READY for member in self._members)

    def assemble(
        self, ended: frozenset[int] = frozenset()
    ) -> tuple[ConnectedRanks, dict[str, float]]:
        """Find an actor for every rank, have it load, and connect all in a new epoch.

        Args:
            ended: ranks known to have closed their connections. Of these, one that does not
                answer is taken to be restarting; any other that does not, to be stuck.

        Returns:
            The ranks, and the seconds that each phase took.

        Raises:
            RankUnavailable: a rank has no actor within the spec's `recovery_timeout_s`, time to
                load apart.
            ModelError: a rank's weights cannot be read.
            LaunchError: the pool has been stopped, or cores cannot be bound as asked.
        """
        with self._using_members:
            for rank in ended:
                self._finder.member(rank).note(Event.ENDED)
            tries = _Tries(time.monotonic() + self._spec.engine.recovery_timeout_s)
            while True:
                self._check_open()
                try:
                    return self._try(tries), tries.phases
                except Exception as error:
                    self._react(error, tries)
                time.sleep(_RETRY_S)

    def stop(self) -> None:
        """End an `assemble` under way, and let no other begin."""
        self._stopping.set()

    def _try(self, tries: _Tries) -> ConnectedRanks:
        with tries.timed("seat"):
            ranks = self._finder.match(tries.deadline)
        with tries.timed("load", is_limited=False):
            load_weights(self._spec, ranks, self._check_open)
        with tries.timed("connect"):
            connected = connect_ranks(self._spec, self._secret, ranks)
        if self._stopping.is_set():
            connected.close()
            self._check_open()
        return connected

    def _react(self, error: Exception, tries: _Tries) -> None:
        """Do what `failure_reactions` decides; return where another try is to follow."""
        failure = _failure(error)
        tries.failures.append(failure)
        if failure is Failure.UNFORESEEN:
            logger.exception("unexpected")
        what = f"the ranks could not be connected: {type(error).__name__}: {error}"
        match reaction_to(failure), error:
            case Reaction.RAISE, _:
                raise error
            case Reaction.MARK_UNFIT, ActorFailed(rank=rank, reason=ModelError() as reason):
                member = self._finder.member(rank)
                member.mark_unfit(reason)
                what = f"{member.address} cannot read the weights of rank {rank}: {reason}"
            case Reaction.REPLACE, ActorFailed(rank=rank):
                self._finder.member(rank).replace(str(error))
        if gives_up(tries.failures, time.monotonic() > tries.deadline):
            raise RankUnavailable(what) from error
        logger.warning("the ranks are matched once more, because: %s", error)

    def _check_open(self) -> None:
        if self._stopping.is_set():
            raise LaunchError("the engine is closing")

    def _keep_spares(self) -> None:
        while not self._stopping.wait(_SPARES_S):
            with self._using_members:
                try:
                    look_after_spares(self._finder.spares(), self._members, self._spec)
                except Exception:  # of Ray's, while its head is away: there is a next time
                    logger.exception("looking after the spares")


@dataclass
class _Tries:
    """The tries to bring the ranks together since the launch, or a loss.

    Attributes:
        deadline: when no other begins, by the monotonic clock.
        phases: seconds spent in each.
        failures: what they have failed with.
    """

    deadline: float
    phases: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @contextmanager
    def timed(self, phase: str, is_limited: bool = True) -> Iterator[None]:
        """Count the time of a `with` block as a phase's; without limit, put the deadline off."""
        started = time.monotonic()
        try:
            yield
        finally:
            taken = time.monotonic() - started
            self.phases[phase] = self.phases.get(phase, 0.0) + taken
            self.deadline += 0.0 if is_limited else taken


def _failure(error: Exception) -> Failure:
    """Tell what a try has failed with."""
    match error:
        case ActorFailed(reason=ModelError()):
            return Failure.CANNOT_READ
        case ActorFailed():
            return Failure.ACTOR_FAILED
        case ExchangeError() | RayActorError() | GetTimeoutError():
            return Failure.RANK_LOST
        case CqilError():
            return Failure.REFUSED
        case _:
            return Failure.UNFORESEEN
