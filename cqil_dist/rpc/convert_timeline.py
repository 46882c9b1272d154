"""Converts timelines of steps to and from the wire's messages."""

from __future__ import annotations

from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.timeline import RankTimeline, Span, SpanKind, StepTimeline


def timeline_to_wire(timeline: StepTimeline) -> pb.StepTimeline:
    """Convert the timeline of one step."""
    return pb.StepTimeline(
        step=timeline.step,
        step_tokens=timeline.step_tokens,
        request_tokens=timeline.request_tokens,
        start_ms=timeline.start_ms,
        duration_ms=timeline.duration_ms,
        ranks=[_rank_to_wire(rank) for rank in timeline.ranks],
    )


def timeline_from_wire(wire: pb.StepTimeline) -> StepTimeline:
    """Read the timeline of one step."""
    return StepTimeline(
        step=wire.step,
        step_tokens=wire.step_tokens,
        request_tokens=wire.request_tokens,
        start_ms=wire.start_ms,
        duration_ms=wire.duration_ms,
        ranks=tuple(_rank_from_wire(rank) for rank in wire.ranks),
    )


def _rank_to_wire(timeline: RankTimeline) -> pb.RankTimeline:
    spans = [
        pb.Span(kind=int(s.kind), group=s.group, start_us=s.start_us, end_us=s.end_us)  # type: ignore[arg-type]
        for s in timeline.spans
    ]
    return pb.RankTimeline(rank=timeline.rank, spans=spans)


def _rank_from_wire(wire: pb.RankTimeline) -> RankTimeline:
    spans = tuple(Span(SpanKind(s.kind), s.group, s.start_us, s.end_us) for s in wire.spans)
    return RankTimeline(wire.rank, spans)
