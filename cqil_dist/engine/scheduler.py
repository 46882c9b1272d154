"""Decides which tokens of which sequences the next step computes: continuous batching.

Knows sequences and their slots, nothing of text, tensors or ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from cqil_dist.engine.sequence import Sequence
from cqil_dist.engine.slot_pool import SlotPool
from cqil_dist.model.step import Segment, Step


@dataclass(frozen=True)
class ScheduledStep:
    """The next step, and the sequence of each of its segments."""

    step: Step
    sequences: tuple[Sequence, ...]


class Scheduler:
    """Serves sequences in the order in which they come, in the slots of a pool.

    Every running sequence has tokens that its KV cache lacks: one when it decodes, many when its
    prompt is new. A step takes all the single ones, so that nobody who decodes waits, and up to
    `prefill_tokens` more: half of them for the prompt that has waited longest, the rest for those
    that take least, so that neither a long prompt nor many short ones starve the others.

    Sequences of several plans take turns: a step walks one plan.
    """

    def __init__(self, slots: SlotPool, prefill_tokens: int) -> None:
        self._slots = slots
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._last_plan = -1

    @property
    def waiting(self) -> int:
        """The number of sequences that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of sequences that hold a slot."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, whether it runs, waits, or is gone already; frees its slot."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
            self._slots.take_back(sequence)

    def drain(self) -> list[Sequence]:
        """Forget all sequences; returns them."""
        sequences = [*self._running, *self._waiting]
        for sequence in sequences:
            self.remove(sequence)
        return sequences

    def schedule(self) -> ScheduledStep | None:
        """Choose the next step; None when there is nothing to compute."""
        while self._waiting and self._slots.free:
            self._slots.give(self._waiting[0])
            self._running.append(self._waiting.popleft())
        if not self._running:
            return None
        plans = {sequence.plan_index for sequence in self._running}
        self._last_plan = min([p for p in plans if p > self._last_plan] or plans)
        running = [s for s in self._running if s.plan_index == self._last_plan]
        decoding = [s for s in running if s.pending == 1]
        counts = dict.fromkeys(sorted(decoding, key=attrgetter("slot")), 1)
        if len(decoding) < len(running):
            prefilling = [s for s in running if s.pending > 1]
            counts.update(_prefill_counts(prefilling, self._prefill_tokens))
        return _step(counts)


def _prefill_counts(sequences: list[Sequence], budget: int) -> Iterator[tuple[Sequence, int]]:
    """Share out a step's prompt tokens among sequences, which are in order of arrival."""
    first, *others = sequences
    counts = {first: min(first.pending, (budget + 1) // 2)}
    for sequence in [*sorted(others, key=attrgetter("pending")), first]:
        room = budget - sum(counts.values())
        have = counts.get(sequence, 0)
        counts[sequence] = have + min(sequence.pending - have, room)
    for sequence in sequences:
        if counts[sequence]:
            yield sequence, counts[sequence]


def _step(counts: dict[Sequence, int]) -> ScheduledStep:
    """Make the step that computes so many tokens of each sequence; all have one plan."""
    segments: list[Segment] = []
    token_ids: list[int] = []
    for sequence, count in counts.items():
        segments.append(sequence.segment(count))
        token_ids += sequence.token_ids[sequence.computed : sequence.computed + count]
    sequences = tuple(counts)
    step = Step(
        tuple(segments),
        tuple(token_ids),
        sequences[0].plan_index,
        argmax_only=all(s.argmax_suffices and not s.unscored for s in sequences),
        wants_timeline=any(s.wants_timeline for s in sequences),
    )
    return ScheduledStep(step, sequences)
