"""The states of a pool's actor, and the events that lead from one to another.

Plain values and decisions; coordinator/pool_member.py asks Ray what has happened.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from cqil_dist.errors import ModelError

# A process that has not answered yet may be importing torch on a busy machine.
_FIRST_ANSWER_S = 60.0


class Lifecycle(Enum):
    """The state of an actor's process, as far as it is known; `Unfit` is the fifth."""

    STARTING = "has not answered since it was started, or since it may have ended"
    RUNNING = "has answered"
    READY = "has answered, and as a spare holds the weights of every rank"
    GONE = "has ended, and Ray does not start another"


@dataclass(frozen=True)
class Unfit:
    """The process has answered but cannot read the model; the actor's next process may."""

    reason: ModelError


class Event(Enum):
    """Something learned of an actor; `Unfit` is the seventh: its process cannot read the model."""

    ANSWERED = "the process that answered last has answered again"
    ANSWERED_ANEW = "another process than the one that answered last has answered"
    ENDED = "the process has ended, or may have, and Ray starts another"
    GIVEN_UP = "Ray does not start it again"
    PREPARED = "as a spare, it holds the weights of every rank"
    UNPREPARED = "it lacks weights, or is no spare for now"


def after(state: Lifecycle | Unfit, event: Event | Unfit) -> Lifecycle | Unfit:
    """Return the state of an actor after an event; one that is gone stays so."""
    if state is Lifecycle.GONE:
        return state
    match event:
        case Event.ANSWERED:
            return Lifecycle.RUNNING if state is Lifecycle.STARTING else state
        case Event.ANSWERED_ANEW:
            return Lifecycle.RUNNING
        case Event.ENDED:
            return Lifecycle.STARTING
        case Event.GIVEN_UP:
            return Lifecycle.GONE
        case Event.PREPARED:
            return Lifecycle.READY if state is Lifecycle.RUNNING else state
        case Event.UNPREPARED:
            return Lifecycle.RUNNING if state is Lifecycle.READY else state
        case Unfit():
            return event
        case _:
            assert_never(event)


def may_become_rank(state: Lifecycle | Unfit) -> bool:
    """Return whether the actor may become a rank, now or when it has started again."""
    return state is not Lifecycle.GONE and not isinstance(state, Unfit)


def has_answered(state: Lifecycle | Unfit) -> bool:
    """Return whether the actor's process has answered, and is not known to have ended since."""
    return state not in (Lifecycle.STARTING, Lifecycle.GONE)


def is_stuck(state: Lifecycle | Unfit, silent_s: float, answer_s: float) -> bool:
    """Return whether an actor has left a question open for so long that its process must go.

    Args:
        silent_s: seconds since the actor was asked.
        answer_s: seconds that one which has answered before may take.
    """
    match state:
        case Lifecycle.RUNNING | Lifecycle.READY | Unfit():
            return silent_s > answer_s
        case Lifecycle.STARTING:
            return silent_s > _FIRST_ANSWER_S
        case Lifecycle.GONE:
            return False
        case _:
            assert_never(state)
