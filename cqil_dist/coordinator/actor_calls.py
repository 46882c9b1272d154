"""Calls to several actors at once: their results, and what they raised, in classes of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from cqil_dist.errors import CqilError

_CALL_TIMEOUT_S = 60.0


class ActorFailed(Exception):
    """An actor raised what its process may raise again: another may do better.

    Attributes:
        rank: the rank that the actor was to be.
        reason: what it raised: no error of this package, or a ModelError while it was to load.
    """

    def __init__(self, rank: int, reason: Exception) -> None:
        super().__init__(f"rank {rank}: {type(reason).__name__}: {reason}")
        self.rank = rank
        self.reason = reason


def results(calls: Sequence[Any]) -> list[Any]:
    """Wait for what the calls of rank 0, 1, ... return; raise the first error as soon as it comes.

    Raises:
        GetTimeoutError: some do not return in a minute.
        ActorFailed, CqilError, RayActorError: as `check_call` raises them.
    """
    deadline = time.monotonic() + _CALL_TIMEOUT_S
    waiting = list(calls)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise GetTimeoutError(
                f"{len(waiting)} actors did not answer within {_CALL_TIMEOUT_S:g} s"
            )
        for call in done:
            check_call(call, calls.index(call))
    returned: list[Any] = ray.get(list(calls))
    return returned


def check_call(call: Any, rank: int) -> None:
    """Raise what a finished call of a rank has raised, if it has.

    Raises:
        CqilError: the actor raised it.
        ActorFailed: the actor raised anything else.
        RayActorError: the actor's process has ended.
    """
    try:
        ray.get(call)
    except RayTaskError as error:
        raised = as_raised(error)
        if isinstance(raised, CqilError):
            raise raised from None
        raise ActorFailed(rank, raised) from error


def as_raised(error: RayTaskError) -> Exception:
    """Return what an actor's call raised, in its own class."""
    return error.cause if isinstance(error.cause, Exception) else error
