"""When each part of a step ended on a rank, and what the coordinator makes of that."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import Any

import torch

from cqil_dist.timeline import RankTimeline, Span, SpanKind

# Clocks of two hosts part by less than this many seconds a second.
_DRIFT = 1e-4

Mark = tuple[int, int, float]
"""Kind (a `SpanKind`), index of the group, and when that part ended: the host's clock, seconds."""


class StepClock:
    """A clock that marks the ends of a step's parts; one part begins where another ends.

    On a GPU parts end when their kernels have been launched, unless the step's timeline is asked
    for: then each waits for its kernels, which makes the step slower.

    Attributes:
        marks: the ends of the latest step's parts, in order.
        seconds: the time of each part, by (plan index, group, kind), summed over all steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._waits = False
        self._plan = 0
        self.started = 0.0
        self.marks: list[Mark] = []
        self.seconds: defaultdict[tuple[int, int, int], float] = defaultdict(float)

    def begin(self, plan_index: int, exact: bool = False) -> None:
        """Begin a step; with `exact`, every mark waits for the GPU."""
        self._plan = plan_index
        self._waits = exact and self._on_gpu
        self.marks = []
        self.started = time.perf_counter()

    def mark(self, kind: SpanKind, group: int) -> None:
        """Note that a part of a group has ended."""
        if self._waits:
            torch.cuda.synchronize()
        self.marks.append((kind, group, time.perf_counter()))

    def end(self) -> None:
        """Add the times of the step's parts to `seconds`."""
        before = self.started
        for kind, group, ended in self.marks:
            self.seconds[self._plan, group, kind] += ended - before
            before = ended


def times_of(clock: StepClock) -> list[Any]:
    """Return when a clock's latest step began, and its marks, as an answer's header has them."""
    return [clock.started, [[int(kind), group, ended] for kind, group, ended in clock.marks]]


class ClockOffset:
    """The seconds to add to a rank's clock to get the coordinator's.

    A step begins on the rank after it was sent and ends before it was answered; in the middle of
    what that leaves open is the offset, and the step that leaves least open tells it best (as in
    NTP). It is 0 where that fits: processes of one host share a clock.
    """

    def __init__(self) -> None:
        self._open_s = math.inf
        self._learned = 0.0
        self.seconds = 0.0

    def learn(self, sent: float, began: float, ended: float, answered: float) -> None:
        lowest, highest = sent - began, answered - ended
        self._open_s += _DRIFT * (sent - self._learned)
        self._learned = sent
        if highest - lowest < self._open_s:
            self._open_s = highest - lowest
            self.seconds = 0.0 if lowest <= 0 <= highest else (lowest + highest) / 2
        self.seconds = min(max(self.seconds, lowest), highest)


def timeline_of(
    rank: int, times: list[Any], offset: ClockOffset, sent: float, answered: float
) -> RankTimeline:
    """Place a rank's spans on the coordinator's clock.

    Args:
        times: what `times_of` gave on the rank.
        sent, answered: when the step was sent and answered, in seconds of the coordinator's clock.
    """
    began, marks = times
    offset.learn(sent, began, marks[-1][2], answered)
    spans: list[Span] = []
    before = began
    for kind, group, ended in marks:
        start_us, end_us = (1e6 * (at + offset.seconds - sent) for at in (before, ended))
        spans.append(Span(SpanKind(kind), group, start_us, end_us))
        before = ended
    return RankTimeline(rank, tuple(spans))
