"""Has every matched actor read its rank's weights, and sees that those who read stay there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from cqil_dist.coordinator.actor_calls import ActorFailed, check_call
from cqil_dist.coordinator.rank_finder import MatchedRank
from cqil_dist.errors import ExchangeError, ModelError
from cqil_dist.rank.spec import EngineSpec

LOADING_ANSWER_S = 10.0
"""Seconds that an actor which may be reading weights has to answer, if it has answered before."""

_POLL_S = 0.05


def load_weights(
    spec: EngineSpec, ranks: Sequence[MatchedRank], check_open: Callable[[], None]
) -> None:
    """Have every actor read its rank's weights, unless it has them.

    Reading takes as long as it takes, as long as those who read are there.

    Args:
        ranks: the actors that are to be rank 0, 1, ...
        check_open: raises where the pool has been stopped.

    Raises:
        ActorFailed: one of them cannot read its weights, or something else is wrong with it.
        ExchangeError, RayActorError: one of them does not answer, or has ended.
        LaunchError: the pool has been stopped.
    """
    calls = [matched.actor.load.remote(spec, rank) for rank, matched in enumerate(ranks)]
    presence = _Presence([matched.actor for matched in ranks])
    waiting = calls
    while waiting:
        check_open()
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_S)
        for call in done:
            _check_loaded(call, calls.index(call))
        presence.check()


def _check_loaded(call: Any, rank: int) -> None:
    try:
        check_call(call, rank)
    except ModelError as error:
        raise ActorFailed(rank, error) from error


class _Presence:
    """The questions that show whether actors are there while they read weights."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors
        self._ask()

    def _ask(self) -> None:
        self._questions = [actor.state.remote() for actor in self._actors]
        self._asked = time.monotonic()

    def check(self) -> None:
        """Raise what is wrong with an actor; ask again once all have answered.

        Raises:
            ExchangeError: some have not answered in time.
            ActorFailed, RayActorError: as `check_call` raises them.
        """
        answers, silent = ray.wait(self._questions, num_returns=len(self._questions), timeout=0)
        for answer in answers:
            check_call(answer, self._questions.index(answer))
        if not silent:
            self._ask()
        elif time.monotonic() - self._asked > LOADING_ANSWER_S:
            raise ExchangeError(
                f"{len(silent)} of {len(self._actors)} actors do not answer while they load"
            )
