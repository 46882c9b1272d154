"""One run: a list of requests, each sent when it is due, and at most so many at once.

Knows nothing of what the requests ask or of other runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from cqil_dist.benchmarks.serve.answer import Answer, read
from cqil_dist.benchmarks.serve.attention import Attention, WatchedSelector
from cqil_dist.benchmarks.serve.recording import Recording, record


@dataclass(frozen=True)
class RunResult:
    """What a run found.

    Attributes:
        max_concurrency: most requests at once; None where nothing held them back.
        duration_s: from the start to the end of the last answer.
        peak: most requests that were under way at once.
        answers: in the order they ended; fewer than requests if the run was interrupted.
        attention: the client's; None if the run was interrupted before anything came.
    """

    max_concurrency: int | None
    duration_s: float
    peak: int
    answers: tuple[Answer, ...]
    attention: Attention | None


class Run:
    """Sends requests and gathers recordings; `result` may be asked at any time.

    Args:
        max_concurrency: most requests at once; None for no bound. What is due while so many are
            under way waits its turn, first come, first served.
        watched: the running loop's selector.
        on_end: called after every request.
    """

    def __init__(
        self, max_concurrency: int | None, watched: WatchedSelector, on_end: Callable[[], None]
    ) -> None:
        self._max_concurrency = max_concurrency
        self._watched = watched
        self._on_end = on_end
        self._started_s = 0.0
        self._under_way = 0
        self._peak = 0
        self._recordings: list[Recording] = []

    async def send(
        self,
        client: httpx.AsyncClient,
        requests: Sequence[httpx.Request],
        arrivals_s: Sequence[float],
        timeout_s: float,
    ) -> None:
        """Send all, each at its arrival (seconds from now) or as soon as there is room after."""
        room = asyncio.Semaphore(self._max_concurrency or len(requests))
        self._watched.turns_s.clear()
        self._started_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for request, arrival_s in zip(requests, arrivals_s, strict=True):
                due_s = self._started_s + arrival_s
                if (early_s := due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(early_s)
                group.create_task(self._send_one(client, request, room, due_s, timeout_s))

    def result(self) -> RunResult:
        """What has been found so far. Reads the recordings, which takes microseconds an event."""
        ended_s = max((each.ended_s for each in self._recordings), default=self._started_s)
        duration_s = ended_s - self._started_s
        attention = Attention.of(self._watched.turns_s, duration_s)
        answers = tuple(read(recording) for recording in self._recordings)
        return RunResult(self._max_concurrency, duration_s, self._peak, answers, attention)

    async def _send_one(
        self,
        client: httpx.AsyncClient,
        request: httpx.Request,
        room: asyncio.Semaphore,
        due_s: float,
        timeout_s: float,
    ) -> None:
        async with room:
            self._under_way += 1
            self._peak = max(self._peak, self._under_way)
            self._recordings.append(await record(client, request, timeout_s, due_s))
            self._under_way -= 1
        self._on_end()
