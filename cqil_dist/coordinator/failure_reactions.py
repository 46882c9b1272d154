"""Decides what a failure means: of bringing the ranks together, and of preparing a spare.

Plain values and decisions; coordinator/recovery.py and coordinator/spare_keeper.py tell failures
apart, and do what is decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import assert_never

from cqil_dist.coordinator.lifecycle import Lifecycle, Unfit

_MAX_UNFORESEEN = 2


class Failure(Enum):
    """The kinds of failure that a try to bring the ranks together may end with."""

    REFUSED = "an error of this package that another try would end with again"
    RANK_LOST = "a process ended, a connection failed, or an answer did not come in time"
    CANNOT_READ = "an actor cannot read its rank's weights"
    ACTOR_FAILED = "an actor raised what is no error of this package"
    UNFORESEEN = "the coordinator raised what is no error of this package"


class Reaction(Enum):
    """The ways to go on from a failure."""

    RAISE = "raise it as it is"
    RETRY = "try once more"
    MARK_UNFIT = "let the actor's process become no rank, and try once more"
    REPLACE = "replace the actor's process, and try once more"


def reaction_to(failure: Failure) -> Reaction:
    """Decide about a failure of bringing the ranks together; nothing else does.

    What another try would end with again (cores that cannot be bound, no actor for a rank, an
    engine that is closing) is raised as it is. A loss is tried again. An actor that cannot read its
    weights becomes no rank as long as there are others. One that raised what is no error of this
    package (out of memory, a device's fault, no port to be had) has its process replaced: what is
    wrong may stay with it. `gives_up` ends the tries.
    """
    match failure:
        case Failure.REFUSED:
            return Reaction.RAISE
        case Failure.RANK_LOST | Failure.UNFORESEEN:
            return Reaction.RETRY
        case Failure.CANNOT_READ:
            return Reaction.MARK_UNFIT
        case Failure.ACTOR_FAILED:
            return Reaction.REPLACE
        case _:
            assert_never(failure)


def gives_up(failures: Sequence[Failure], is_over: bool) -> bool:
    """Return whether no other try follows: time is over, or too much went wrong unforeseen.

    Args:
        failures: those of all tries since the launch, or the loss.
        is_over: whether the time for bringing the ranks together has passed.
    """
    unforeseen = sum(f in (Failure.ACTOR_FAILED, Failure.UNFORESEEN) for f in failures)
    return is_over or unforeseen > _MAX_UNFORESEEN


class Preparation(Enum):
    """The progress of a spare's latest call to read the weights of all ranks."""

    NONE = "it has ended, with whatever memory allowed or with what may pass; or there was none"
    UNDER_WAY = "it has not ended"
    CANNOT_READ = "it has failed, since the process cannot read the model"


class SpareAction(Enum):
    """The ways to treat an actor without a rank."""

    LEAVE = "leave it as it is"
    WAIT = "wait for the end of its call"
    PREPARE = "call it to read the weights it lacks"
    MARK_UNFIT = "let its process become no rank"


def next_for_spare(state: Lifecycle | Unfit, preparation: Preparation) -> SpareAction:
    """Decide what to do with an actor without a rank.

    One that lacks weights is called again and again: it may have started anew, or have memory free
    that was not.
    """
    if state is Lifecycle.READY or state is Lifecycle.GONE or isinstance(state, Unfit):
        return SpareAction.LEAVE
    match preparation:
        case Preparation.NONE:
            return SpareAction.PREPARE
        case Preparation.UNDER_WAY:
            return SpareAction.WAIT
        case Preparation.CANNOT_READ:
            return SpareAction.MARK_UNFIT
        case _:
            assert_never(preparation)
