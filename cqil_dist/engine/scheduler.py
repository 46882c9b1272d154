"""Which tokens of which requests the next step computes: continuous batching over KV slots.

Knows requests' token counts and slots, nothing of tensors or ranks.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cqil_dist.engine.request import Request
from cqil_dist.model.step import Segment, Step


@dataclass(frozen=True)
class ScheduledStep:
    """The next step, and the request of each of its segments."""

    step: Step
    requests: tuple[Request, ...]


class Scheduler:
    """First come, first served, into `slots` KV slots.

    Every running request has tokens that its KV cache lacks: one when it decodes, many when its
    prompt is new. A step takes all the single ones, so that nobody who decodes waits, and up to
    `prefill_tokens` more: half of them for the prompt that has waited longest, the rest for those
    that take least, so that neither a long prompt nor many short ones starve the others.

    Requests of several plans take turns: a step walks one plan.
    """

    def __init__(self, slots: int, prefill_tokens: int) -> None:
        self.slots = slots
        self._prefill_tokens = prefill_tokens
        self._free = list(range(slots))  # a heap: low slots stay adjacent, hence views
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._last_plan = -1

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
        if not self._running:
            return None
        self._last_plan = self._next_plan()
        running = [r for r in self._running if r.plan == self._last_plan]
        decoding = [r for r in running if r.pending == 1]
        decoding.sort(key=lambda request: request.slot or 0)
        prefilling = [r for r in running if r.pending > 1]
        return _step([*((r, 1) for r in decoding), *_prefills(prefilling, self._prefill_tokens)])

    def _next_plan(self) -> int:
        plans = {request.plan for request in self._running}
        return min(plans, key=lambda plan: (plan <= self._last_plan, plan))


def _prefills(requests: Sequence[Request], budget: int) -> Iterator[tuple[Request, int]]:
    """How many of its tokens each of these, in order of arrival, computes in the next step."""
    if not requests:
        return
    first, *others = requests
    counts = {first: min(first.pending, (budget + 1) // 2)}
    for request in [*sorted(others, key=lambda request: request.pending), first]:
        room = budget - sum(counts.values())
        have = counts.get(request, 0)
        counts[request] = have + min(request.pending - have, room)
    for request in requests:
        if counts[request]:
            yield request, counts[request]


def _step(scheduled: Sequence[tuple[Request, int]]) -> ScheduledStep:
    segments: list[Segment] = []
    token_ids: list[int] = []
    for request, count in scheduled:
        assert request.slot is not None, "scheduled requests hold a slot"
        start, end = request.computed, request.computed + count
        logits = max(0, end - max(start, request.wanted_from))
        segments.append(Segment(request.slot, start, count, logits))
        token_ids += request.tokens[start:end]
    requests = tuple(request for request, _ in scheduled)
    step = Step(
        tuple(segments),
        tuple(token_ids),
        requests[0].plan,
        argmax_only=all(request.wants_argmax for request in requests),
        wants_timeline=any(request.wants_timeline for request in requests),
    )
    return ScheduledStep(step, requests)
