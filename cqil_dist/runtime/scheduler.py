"""Which tokens of which requests the next step computes: continuous batching over KV slots.

Knows requests' token counts and slots, nothing of tensors or ranks.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cqil_dist.model.step import Segment
from cqil_dist.runtime.request import Request


@dataclass(frozen=True)
class ScheduledStep:
    """Segments of the next step, and the request of each."""

    segments: tuple[Segment, ...]
    requests: tuple[Request, ...]

    @property
    def token_ids(self) -> list[int]:
        return [
            token
            for segment, request in zip(self.segments, self.requests, strict=True)
            for token in request.tokens[segment.start : segment.end]
        ]


class Scheduler:
    """First come, first served, into `slots` KV slots.

    Every running request has tokens that its KV cache lacks: one when it decodes, many when its
    prompt is new. A step takes all the single ones, so that nobody who decodes waits, and fills up
    to `prefill_tokens` more from the others in order of arrival.
    """

    def __init__(self, slots: int, prefill_tokens: int) -> None:
        self.slots = slots
        self._prefill_tokens = prefill_tokens
        self._free = list(range(slots))  # a heap: low slots stay adjacent, hence views
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request, whether it runs, waits, or is gone already; frees its slot."""
        if request in self._waiting:
            self._waiting.remove(request)
        if request in self._running:
            self._running.remove(request)
            assert request.slot is not None, "running requests hold a slot"
            heapq.heappush(self._free, request.slot)
            request.slot = None

    def lose_cache(self) -> None:
        """The KV cache is gone: every running request computes its tokens again, in its slot."""
        for request in self._running:
            request.lose_cache()

    def drain(self) -> list[Request]:
        """Forget all requests; returns them."""
        requests = [*self._running, *self._waiting]
        for request in requests:
            self.remove(request)
        return requests

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None when there is nothing to compute."""
        while self._waiting and self._free:
            request = self._waiting.popleft()
            request.slot = heapq.heappop(self._free)
            self._running.append(request)
        decoding = [r for r in self._running if r.pending == 1]
        decoding.sort(key=lambda request: request.slot or 0)
        scheduled = [(request, 1) for request in decoding]
        budget = self._prefill_tokens
        for request in self._running:
            if request.pending > 1 and budget > 0:
                count = min(request.pending, budget)
                scheduled.append((request, count))
                budget -= count
        if not scheduled:
            return None
        return _step(scheduled)


def _step(scheduled: Sequence[tuple[Request, int]]) -> ScheduledStep:
    segments: list[Segment] = []
    for request, count in scheduled:
        assert request.slot is not None, "scheduled requests hold a slot"
        segments.append(Segment(request.slot, request.computed, count, count == request.pending))
    return ScheduledStep(tuple(segments), tuple(request for request, _ in scheduled))
