"""Defines timelines, which say where the time of a step went, by rank and group of the plan.

These are plain values without torch or numpy, so that ranks, clients and tools share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class SpanKind(IntEnum):
    """The kind of work a rank did during a span. The values are those of the wire."""

    ATTENTION = 1
    ATTENTION_EXCHANGE = 2
    FEED_FORWARD = 3
    OUTPUT_EXCHANGE = 4
    HEAD = 5

    @property
    def label(self) -> str:
        """Return the kind in words, such as "attention exchange"."""
        return self.name.lower().replace("_", " ")

    @property
    def is_exchange(self) -> bool:
        """Return whether the rank moved data or waited for a peer rather than computed."""
        return self in (SpanKind.ATTENTION_EXCHANGE, SpanKind.OUTPUT_EXCHANGE)


@dataclass(frozen=True)
class Span:
    """A span of time in which one rank worked on one part of one group.

    Attributes:
        group: index of the plan's group; the number of groups for the vocabulary head.
        start_us, end_us: microseconds since the step's beginning on the coordinator.
    """

    kind: SpanKind
    group: int
    start_us: float
    end_us: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind.label,
            "group": self.group,
            "start_us": self.start_us,
            "end_us": self.end_us,
        }


@dataclass(frozen=True)
class RankTimeline:
    """The spans of one rank during a step, in order of time."""

    rank: int
    spans: tuple[Span, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "spans": [span.to_dict() for span in self.spans]}


@dataclass(frozen=True)
class StepTimeline:
    """The timeline of a step, as one of its requests is told it.

    Attributes:
        step: its number since the coordinator started.
        step_tokens, request_tokens: tokens of all requests that it computed, and of this one.
        start_ms: milliseconds from the request's arrival at the engine to the step's beginning.
        duration_ms: from there until all ranks had answered.
    """

    step: int
    step_tokens: int
    request_tokens: int
    start_ms: float
    duration_ms: float
    ranks: tuple[RankTimeline, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "step_tokens": self.step_tokens,
            "request_tokens": self.request_tokens,
            "start_ms": self.start_ms,
            "duration_ms": self.duration_ms,
            "ranks": [rank.to_dict() for rank in self.ranks],
        }
