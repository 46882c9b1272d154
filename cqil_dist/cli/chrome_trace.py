"""A request's timelines as a trace in Chrome's format, which Perfetto reads as well.

Format: "Trace Event Format" (Google, 2016), complete events; times are microseconds since the
request's arrival at the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cqil_dist.plan import Plan
from cqil_dist.timeline import RankTimeline, Span, StepTimeline

_COORDINATOR = 0


def chrome_trace(
    timelines: Sequence[StepTimeline], plan: Plan, rank_names: Mapping[int, str]
) -> dict[str, Any]:
    """Lay out the trace of one request.

    Args:
        timelines: of its steps, in order.
        rank_names: what to call each rank.

    Returns:
        What `json.dump` writes for chrome://tracing or ui.perfetto.dev: the coordinator's steps in
        one row, and below it a row for each rank with a slice for every part of every group.
    """
    return {
        "traceEvents": [*_rows(rank_names), *_slices(timelines, plan)],
        "displayTimeUnit": "ms",
        "otherData": {"plan": str(plan)},
    }


def _rows(rank_names: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    yield _row(_COORDINATOR, "coordinator")
    for rank, name in rank_names.items():
        yield _row(_process_of(rank), name)


def _row(process: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}


def _process_of(rank: int) -> int:
    return rank + 1


def _slices(timelines: Sequence[StepTimeline], plan: Plan) -> Iterator[dict[str, Any]]:
    if timelines and (queued_us := 1000 * timelines[0].start_ms) > 0:
        yield _slice(_COORDINATOR, "queued", 0.0, queued_us, {})
    for timeline in timelines:
        start_us = 1000 * timeline.start_ms
        phase = "decode" if timeline.request_tokens == 1 else "prefill"
        counts = {
            "step": timeline.step,
            "tokens of the step": timeline.step_tokens,
            "tokens of the request": timeline.request_tokens,
        }
        yield _slice(_COORDINATOR, phase, start_us, 1000 * timeline.duration_ms, counts)
        for rank in timeline.ranks:
            yield from _rank_slices(rank, plan, start_us)


def _rank_slices(rank: RankTimeline, plan: Plan, start_us: float) -> Iterator[dict[str, Any]]:
    for span in rank.spans:
        yield _slice(
            _process_of(rank.rank),
            _name(span, plan),
            start_us + span.start_us,
            span.end_us - span.start_us,
            {"group": span.group, "kind": span.kind.label},
        )


def _name(span: Span, plan: Plan) -> str:
    if span.group == plan.depth:
        return span.kind.label
    layers = plan.groups[span.group].layers
    which = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
    return f"{span.kind.label} {which}"


def _slice(
    process: int, name: str, start_us: float, duration_us: float, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": 0,
        "ts": round(start_us, 3),
        "dur": round(max(duration_us, 0.0), 3),
        "args": args,
    }
