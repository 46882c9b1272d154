"""Who is let in, who is within, and how a service empties before it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from cqil_dist.errors import ServiceUnavailable

_GOES_ON = "the server is ending; the same request goes on elsewhere with the tokens it has"


class Admission:
    """Counts requests in and out, over all the ways they come in.

    Attributes:
        draining: nobody is let in any more.
    """

    def __init__(self) -> None:
        self.draining = False
        self._within: set[str] = set()
        self._sent_away = False

    @property
    def within(self) -> int:
        """How many requests are being served."""
        return len(self._within)

    @contextmanager
    def admitted(self, request_id: str) -> Iterator[None]:
        """A request that is being served. Raises ServiceUnavailable once the service drains."""
        if self.draining:
            raise ServiceUnavailable("the server is ending; ask another, or again in a while")
        self._within.add(request_id)
        try:
            yield
        finally:
            self._within.discard(request_id)

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
        await asyncio.gather(*(abort(request_id) for request_id in left), return_exceptions=True)
        await self._empty(grace_s)
        return len(left)

    async def _empty(self, timeout_s: float) -> bool:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._within and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        return not self._within
