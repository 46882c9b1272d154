"""Who is let in, who is within, and how a service empties before it ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from cqil_dist.errors import QueueFull, ServiceUnavailable

_GOES_ON = "the server is ending; the same request goes on elsewhere with the tokens it has"
_ABORTS_AT_ONCE = 8


class Admission:
    """Counts requests in and out, over all the ways they come in.

    Args:
        capacity: requests that can run and wait where they are served.
        beyond: most that are let in besides, to be refused there.

    Attributes:
        capacity: as given.
        draining: nobody is let in any more.
    """

    def __init__(self, capacity: int, beyond: int = 0) -> None:
        self.draining = False
        self.capacity = capacity
        self._limit = capacity + beyond
        # By name: one that resumes may come in before its former self is out.
        self._within: Counter[str] = Counter()
        self._sent_away = False

    @property
    def within(self) -> int:
        """How many requests are being served."""
        return self._within.total()

    @contextmanager
    def admitted(self, request_id: str) -> Iterator[None]:
        """A request that is being served.

        Raises:
            QueueFull: as many are within as may.
            ServiceUnavailable: the service drains.
        """
        if self.draining:
            raise ServiceUnavailable("the server is ending; ask another, or again in a while")
        if self.within >= self._limit:
            raise QueueFull(f"{self._limit} requests run and wait here; try again later")
        self._within[request_id] += 1
        try:
            yield
        finally:
            self._within[request_id] -= 1
            self._within += Counter()  # names whose count is 0 go

    def check_own_end(self, finish_reason: str | None) -> None:
        """Raises ServiceUnavailable for a request that was ended because the service ends."""
        if finish_reason == "abort" and self._sent_away:
            raise ServiceUnavailable(_GOES_ON)

    async def drain(
        self, timeout_s: float, abort: Callable[[str], Awaitable[bool]], grace_s: float = 5.0
    ) -> int:
        """Let nobody in, and wait until all are out; after the timeout, send them away.

        Args:
            abort: ends a request.
            grace_s: for those that are sent away to take their leave.

        Returns:
            How many were sent away.
        """
        self.draining = True
        if await self._empty(timeout_s):
            return 0
        self._sent_away = True
        left = list(self._within)
        some = asyncio.Semaphore(_ABORTS_AT_ONCE)

        async def send_away(request_id: str) -> None:
            async with some:
                await abort(request_id)

        aborts = (send_away(request_id) for request_id in left)
        with suppress(TimeoutError):  # the coordinator may be away itself
            async with asyncio.timeout(grace_s):
                await asyncio.gather(*aborts, return_exceptions=True)
        await self._empty(grace_s)
        return len(left)

    async def _empty(self, timeout_s: float) -> bool:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._within and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        return not self._within
