"""Where a request's time went: every step once, and ranks' clocks on the coordinator's."""

from __future__ import annotations

import pytest
import torch
from helpers.observed_engine import PLAN, ObservedModel, ask, greedy, read, serving
from helpers.tiny_models import TinyModelFactory, random_tokens

from cqil_dist.outputs import Chunk
from cqil_dist.rank.clock import ClockOffset, StepClock, timeline_of, times_of
from cqil_dist.timeline import SpanKind, StepTimeline

LONG = random_tokens(41, seed=41)
PREFILL_TOKENS = 8


def timelines(chunks: list[Chunk]) -> list[StepTimeline]:
    return [chunk.timeline for chunk in chunks if chunk.timeline is not None]


def test_every_step_of_a_request_is_told_once(tiny_model: TinyModelFactory) -> None:
    model = tiny_model()
    steps = ObservedModel(model, model.plan(PLAN), 4)
    with serving(model, steps, prefill_tokens=PREFILL_TOKENS) as engine:
        chunks = read(engine.submit(ask(LONG, greedy(5), wants_timeline=True)))
        plain = read(engine.submit(ask(LONG, greedy(5))))
        whole = read(engine.submit(ask(LONG, greedy(5), wants_timeline=True, final_only=True)))
    told = timelines(chunks)
    # The prompt in six steps, the last of which gives the first token; then one a token.
    assert [timeline.request_tokens for timeline in told] == [8, 8, 8, 8, 8, 1, 1, 1, 1, 1]
    assert [timeline.step for timeline in told] == list(range(10))
    assert [len(chunk.token_ids) for chunk in chunks] == [0] * 5 + [1] * 5
    ends = [timeline.start_ms + timeline.duration_ms for timeline in told]
    assert all(0 <= end <= after.start_ms for end, after in zip(ends[:-1], told[1:], strict=True))
    assert timelines(plain) == []
    assert len(whole) == 1


def test_an_aborted_request_s_last_step_is_not_told_again(tiny_model: TinyModelFactory) -> None:
    model = tiny_model()
    steps = ObservedModel(model, model.plan(PLAN), 4)
    with serving(model, steps) as engine:
        with steps.held():
            request = engine.submit(ask("x", greedy(50), wants_timeline=True))
            assert steps.started.wait(30)
            engine.cancel(request)
        chunks = read(request)
    assert chunks[-1].finish_reason == "abort"
    numbers = [timeline.step for timeline in timelines(chunks)]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("ahead_s", [0.0, 1000.0, -5000.0])
def test_a_rank_s_clock_is_put_on_the_coordinator_s(ahead_s: float) -> None:
    """Another host's clock began elsewhere; a step's sending and answering bound the difference."""
    offset = ClockOffset()
    for slack_s in (0.5, 0.02, 0.3):  # one step of the three comes and goes quickly
        sent = 50.0
        began = sent + slack_s / 2 + ahead_s
        times = [
            began,
            [[int(SpanKind.ATTENTION), 0, began + 1], [int(SpanKind.HEAD), 1, began + 3]],
        ]
        timeline = timeline_of(1, times, offset, sent, sent + 3 + slack_s)
    first, last = timeline.spans
    assert timeline.rank == 1
    assert (first.kind, first.group, last.kind, last.group) == (
        SpanKind.ATTENTION,
        0,
        SpanKind.HEAD,
        1,
    )
    assert first.end_us == last.start_us
    assert first.end_us - first.start_us == pytest.approx(1e6, abs=1)
    assert last.end_us - last.start_us == pytest.approx(2e6, abs=1)
    # As exact as the quick step allows.
    assert first.start_us == pytest.approx(1e6 * 0.15, abs=1e6 * 0.02)


def test_a_clock_adds_up_what_its_marks_say() -> None:
    clock = StepClock(torch.device("cpu"))
    totals: dict[tuple[int, int, int], float] = {}
    for plan in (0, 1, 0):
        clock.begin(plan)
        clock.mark(SpanKind.ATTENTION, 0)
        clock.mark(SpanKind.OUTPUT_EXCHANGE, 0)
        clock.end()
        began, marks = times_of(clock)
        for kind, group, ended in marks:
            key = (plan, group, kind)
            totals[key] = totals.get(key, 0.0) + ended - began
            began = ended
    assert dict(clock.seconds) == pytest.approx(totals)
    assert set(totals) == {(plan, 0, kind) for plan in (0, 1) for kind in (1, 4)}
