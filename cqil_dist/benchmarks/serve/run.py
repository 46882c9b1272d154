"""One run: a list of requests, each sent when it is due, and no more at once than a limit.

Knows nothing of the requests' content or of other runs.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import httpx

from cqil_dist.benchmarks.serve.stream import Answer, Recording, read, record


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Return the seconds from the start at which `count` requests are due, ascending from 0.

    Gaps are drawn from a gamma distribution with mean 1 / `rate` and shape `burstiness`: 1 gives
    a Poisson process, less gives bursts, more is more regular. The same seed gives the same
    moments, scaled if the rate is another. At an infinite rate, all are due at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    draw = random.Random(seed)
    gaps = (draw.gammavariate(burstiness, 1 / (burstiness * rate)) for _ in range(count - 1))
    return list(accumulate(gaps, initial=0.0))


@dataclass
class Run:
    """A run and its answers.

    Attributes:
        max_concurrency: the most requests at once; None for no limit. A request that is due while
            so many are in progress waits, first come, first served.
        duration_s: seconds from the start to the end of the last answer, or until Ctrl-C.
        client_cpu_share: CPU time that this process used, as a fraction of one core's. Near 1, the
            client is what was measured.
        peak: the most requests that were in progress at once.
        answers: in the order they ended; fewer than the requests if the run was interrupted.
    """

    max_concurrency: int | None
    duration_s: float = 0.0
    client_cpu_share: float = 0.0
    peak: int = 0
    answers: list[Answer] = field(default_factory=list)

    async def send(
        self,
        client: httpx.AsyncClient,
        requests: Sequence[httpx.Request],
        arrivals_s: Sequence[float],
        timeout_s: float,
        on_end: Callable[[], None],
    ) -> None:
        """Send all requests, each when it is due, or later as soon as the limit allows.

        Args:
            arrivals_s: when each request is due, in seconds from now.
            timeout_s: the most seconds of one answer.
            on_end: called after every request.
        """
        limit = asyncio.Semaphore(self.max_concurrency or len(requests))
        recordings: list[Recording] = []
        in_progress = 0

        async def send_one(request: httpx.Request, due_s: float) -> None:
            nonlocal in_progress
            async with limit:
                in_progress += 1
                self.peak = max(self.peak, in_progress)
                recordings.append(await record(client, request, timeout_s, due_s))
                in_progress -= 1
            on_end()

        started_s, cpu_s = time.perf_counter(), time.process_time()
        try:
            async with asyncio.TaskGroup() as group:
                for request, arrival_s in zip(requests, arrivals_s, strict=True):
                    due_s = started_s + arrival_s
                    if (early_s := due_s - time.perf_counter()) > 0:
                        await asyncio.sleep(early_s)
                    group.create_task(send_one(request, due_s))
        finally:
            self.duration_s = time.perf_counter() - started_s
            self.client_cpu_share = (time.process_time() - cpu_s) / self.duration_s
            self.answers = [read(recording) for recording in recordings]
