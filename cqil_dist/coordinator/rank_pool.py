"""Brings the ranks together, out of a pool of actors: at launch, and after any loss.

Launching and recovering are one procedure. Ranks whose actors are alive and hold their weights
keep them; the others go to whatever actor answers (one that Ray has started again, or a spare) and
load. Then all listen in the next epoch, connect, and serve. If another is lost meanwhile, it
starts over, until the deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from cqil_dist.coordinator.pool_member import Candidate, end_stuck, read_answers
from cqil_dist.coordinator.rank_matching import match_ranks
from cqil_dist.coordinator.rendezvous import (
    ActorFailed,
    ConnectedRanks,
    as_raised,
    check_call,
    connect_ranks,
)
from cqil_dist.errors import CqilError, ExchangeError, LaunchError, ModelError, RankUnavailable
from cqil_dist.rank.mesh_spec import ActorState
from cqil_dist.rank.spec import EngineSpec

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_RETRY_S = 0.2
_MAX_SURPRISES = 2
# An actor that has answered before and does not within this long is stuck, or its node is cut off.
_ANSWER_S = 1.0
# One whose connection is closed may have lost its peers only, and answers soon.
_GRACE_S = 0.3
_LOADING_ANSWER_S = 10.0
_SPARES_S = 1.0


class RankPool:
    """The actors of a launch, spare ones included, as its coordinator sees them.

    Args:
        actors: handles of at least as many `LayerActor`s as there are ranks.
        secret: of the launch.
    """

    def __init__(self, actors: Sequence[Any], spec: EngineSpec, secret: bytes) -> None:
        self._candidates = [Candidate(actor) for actor in actors]
        self._spec = spec
        self._secret = secret
        self._seats: dict[int, int] = {}
        self._stopping = threading.Event()
        self._assembling = threading.Lock()
        self.waiting_for = ""
        if len(actors) > spec.world:
            threading.Thread(target=self._keep_spares, name="spares", daemon=True).start()

    def assemble(
        self, ended: frozenset[int] = frozenset()
    ) -> tuple[ConnectedRanks, dict[str, float]]:
        """Connect all ranks in a new epoch.

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
        with self._assembling:
            return self._assemble(ended)

    def _assemble(self, ended: frozenset[int]) -> tuple[ConnectedRanks, dict[str, float]]:
        deadline = time.monotonic() + self._spec.recovery_timeout_s
        for rank in ended:
            if (seat := self._seats.get(rank)) is not None:
                self._candidates[seat].known = False
        phases: dict[str, float] = {}
        surprises = 0
        while True:
            self._check_stopping()
            try:
                with _timed(phases, "seat"):
                    states = self._seat(deadline)
                before = time.monotonic()
                try:
                    with _timed(phases, "load"):
                        self._load()
                finally:
                    deadline += time.monotonic() - before
                with _timed(phases, "connect"):
                    actors = [candidate.actor for candidate in self._seated()]
                    met = connect_ranks(self._spec, self._secret, actors, states)
                if self._stopping.is_set():
                    for link in met.links:
                        link.close()
                    self._check_stopping()
                return met, phases
            except (ExchangeError, RayActorError, GetTimeoutError) as error:
                reason: Exception = error
            except CqilError:
                raise
            except ActorFailed as error:  # another process may do better
                surprises += 1
                self._candidates[self._seats[error.rank]].renew(str(error))
                reason = error
            except Exception as error:
                surprises += 1
                logger.exception("unexpected")
                reason = error
            if time.monotonic() > deadline or surprises > _MAX_SURPRISES:
                raise RankUnavailable(
                    f"the ranks could not meet: {type(reason).__name__}: {reason}"
                ) from reason
            logger.warning("the ranks meet once more, because: %s", reason)
            time.sleep(_RETRY_S)

    def stop(self) -> None:
        """End an `assemble` under way, and let no other begin."""
        self._stopping.set()

    def ready_spares(self) -> int:
        """How many actors without a rank hold the weights of all of them."""
        return sum(candidate.ready for candidate in self._candidates)

    # Spares: actors without a rank.

    def _keep_spares(self) -> None:
        while not self._stopping.wait(_SPARES_S):
            with self._assembling:
                try:
                    self._look_after_spares()
                except Exception:  # of Ray's, while its head is away: there is a next time
                    logger.exception("looking after the spares")

    def _look_after_spares(self) -> None:
        """Have spares read the weights that they may be asked for.

        Those too that have started anew, or find memory free later. One that is stuck starts anew.
        """
        everything = frozenset(range(self._spec.world))
        spares = [
            candidate
            for index, candidate in enumerate(self._candidates)
            if self._seats and index not in self._seats.values() and not candidate.gone
        ]
        for spare in spares:
            if spare.question is None:
                spare.ask()
        read_answers(self._candidates)
        end_stuck(spares, _LOADING_ANSWER_S)
        for spare in spares:
            if spare.state is not None:
                spare.ready = spare.state.ranks >= everything
            elif not spare.known:
                spare.ready = False
            if not spare.ready and spare.able:
                self._prepare(spare)

    def _prepare(self, spare: Candidate) -> None:
        if spare.preparing is not None:
            if not ray.wait([spare.preparing], timeout=0)[0]:
                return
            try:
                ray.get(spare.preparing)
            except RayTaskError as error:
                if isinstance(cause := as_raised(error), ModelError):
                    spare.note_unfit(cause)
                    return
                logger.warning("a spare could not read the weights, and tries again: %s", error)
            except RayError:
                logger.info("a spare's process has ended; the next one will read the weights")
        spare.preparing = spare.actor.prepare.remote(self._spec)

    # Seating: an actor that answers for every rank.

    def _seat(self, deadline: float) -> dict[int, ActorState]:
        """Choose an actor for every rank; returns their states."""
        started = time.monotonic()
        for candidate in self._candidates:
            candidate.ready = False
            if not candidate.gone:
                candidate.ask()
        while True:
            read_answers(self._candidates)
            answered = {
                index: candidate.state
                for index, candidate in enumerate(self._candidates)
                if candidate.state is not None and candidate.able
            }
            missing = [c for c in self._candidates if c.state is None and c.able]
            grace = time.monotonic() < started + _GRACE_S
            seats = match_ranks(self._spec.world, answered, self._seats)
            if seats is not None and (not missing or not grace):
                # Those that may still answer are waited for if weights would have to be read that
                # they may hold. Else others take their ranks, and they start anew.
                loaded = all(rank in answered[seat].ranks for rank, seat in seats.items())
                if loaded or not any(candidate.known for candidate in missing):
                    for candidate in self._seated():
                        if candidate.known and candidate.state is None:
                            candidate.restart(time.monotonic() - started)
                    self._seats = seats
                    self.waiting_for = ""
                    return {rank: answered[seat] for rank, seat in seats.items()}
            end_stuck(self._candidates, _ANSWER_S)
            self._wait(deadline, answered)

    def _wait(self, deadline: float, answered: Mapping[int, ActorState]) -> None:
        held = frozenset[int]().union(*(state.ranks for state in answered.values()))
        lost = [
            f"rank {rank} (was on {self._candidates[seat].address})"
            for rank, seat in sorted(self._seats.items())
            if seat not in answered
        ] or [f"rank {rank}" for rank in range(self._spec.world) if rank not in held]
        self.waiting_for = ", ".join(lost)
        self._check_stopping()
        self._check_fit()
        living = sum(not candidate.gone for candidate in self._candidates)
        if time.monotonic() > deadline or living < self._spec.world:
            raise RankUnavailable(
                f"no actor for {self.waiting_for} within {self._spec.recovery_timeout_s:g} s: "
                f"{len(answered)} of {len(self._candidates)} actors answer and "
                f"{self._spec.world} are needed; add a node, or launch again with fewer "
                "ranks"
            )
        time.sleep(_POLL_S)

    def _check_fit(self) -> None:
        """Raise why actors cannot read the model, if those that can are too few."""
        unfit = [c.unfit for c in self._candidates if c.unfit is not None and not c.gone]
        if unfit and sum(c.able for c in self._candidates) < self._spec.world:
            raise unfit[0]

    def _check_stopping(self) -> None:
        if self._stopping.is_set():
            raise LaunchError("the engine is closing")

    # Loading.

    def _seated(self) -> list[Candidate]:
        return [self._candidates[self._seats[rank]] for rank in range(len(self._seats))]

    def _load(self) -> None:
        """Every seated actor reads its rank's weights, unless it has them.

        Raises:
            ExchangeError: one of them cannot, or is lost; it takes another.
            ActorFailed: something else is wrong with one.
        """
        seated = self._seated()
        loading = {
            candidate.actor.load.remote(self._spec, rank): rank
            for rank, candidate in enumerate(seated)
        }
        questions = [candidate.actor.state.remote() for candidate in seated]
        asked = time.monotonic()
        waiting = list(loading)
        while waiting:
            self._check_stopping()
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_S)
            for call in done:
                self._check_loaded(call, loading[call], seated)
            # Reading takes as long as it takes, as long as those who read are there.
            answers, silent = ray.wait(questions, num_returns=len(questions), timeout=0)
            for answer in answers:
                check_call(answer, questions.index(answer))
            if not silent:
                questions = [candidate.actor.state.remote() for candidate in seated]
                asked = time.monotonic()
            elif time.monotonic() - asked > _LOADING_ANSWER_S:
                raise ExchangeError(
                    f"{len(silent)} of {len(seated)} actors do not answer while they load"
                )

    def _check_loaded(self, call: Any, rank: int, seated: Sequence[Candidate]) -> None:
        try:
            check_call(call, rank)
        except ModelError as error:
            seated[rank].note_unfit(error)
            raise ExchangeError(f"{seated[rank].address} cannot read its rank's weights") from error


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        phases[name] = phases.get(name, 0.0) + time.monotonic() - started
