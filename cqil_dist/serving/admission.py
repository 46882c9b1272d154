"""Admission of requests: how many may be in progress, and how a service drains before it ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from cqil_dist.errors import QueueFull, ServiceUnavailable

_GOES_ON = "the server is ending; the same request goes on elsewhere with the tokens it has"
_ABORTS_AT_ONCE = 8


class Admission:
    """The requests in progress, over gRPC and HTTP together, and a limit on their number.

    Args:
        capacity: requests that the engine can run and queue.
        beyond: requests admitted besides, for the engine to refuse.

    Attributes:
        capacity: requests that the engine can run and queue.
        draining: whether new requests are refused because the service is ending.
    """

    def __init__(self, capacity: int, beyond: int = 0) -> None:
        self.draining = False
        self.capacity = capacity
        self._limit = capacity + beyond
        # Counted by id: a request that is resumed may be admitted before its first call has ended.
        self._in_progress: Counter[str] = Counter()
        self._aborted_late = False

    @property
    def in_progress(self) -> int:
        """Return how many admitted requests have not ended."""
        return self._in_progress.total()

    @contextmanager
    def admitted(self, request_id: str) -> Iterator[None]:
        """Count a request as in progress for the length of the block.

        Raises:
            QueueFull: as many requests are in progress as may be.
            ServiceUnavailable: the service is draining.
        """
        if self.draining:
            raise ServiceUnavailable("the server is ending; ask another, or again in a while")
        if self.in_progress >= self._limit:
            raise QueueFull(f"{self._limit} requests run and wait here; try again later")
        self._in_progress[request_id] += 1
        try:
            yield
        finally:
            self._in_progress[request_id] -= 1
            self._in_progress += Counter()  # removes ids whose count is 0

    def check_not_aborted_late(self, finish_reason: str | None) -> None:
        """Raise ServiceUnavailable where a request ended because `drain` aborted it."""
        if finish_reason == "abort" and self._aborted_late:
            raise ServiceUnavailable(_GOES_ON)

    async def drain(
        self, timeout_s: float, abort: Callable[[str], Awaitable[bool]], grace_s: float = 5.0
    ) -> int:
        """Refuse new requests, wait for those in progress, and abort the ones that are late.

        Args:
            timeout_s: seconds that requests in progress have to finish.
            abort: ends the request of an id.
            grace_s: seconds for the aborts to be sent, and again for the aborted calls to end.

        Returns:
            How many requests were aborted.
        """
        self.draining = True
        if await self._wait_until_empty(timeout_s):
            return 0
        self._aborted_late = True
        late = list(self._in_progress)
        at_once = asyncio.Semaphore(_ABORTS_AT_ONCE)

        async def abort_one(request_id: str) -> None:
            async with at_once:
                await abort(request_id)

        aborts = (abort_one(request_id) for request_id in late)
        with suppress(TimeoutError):  # the coordinator may not answer
            async with asyncio.timeout(grace_s):
                await asyncio.gather(*aborts, return_exceptions=True)
        await self._wait_until_empty(grace_s)
        return len(late)

    async def _wait_until_empty(self, timeout_s: float) -> bool:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._in_progress and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        return not self._in_progress
