"""Whoever decodes goes on in every step, prompts fill what is left, and slots come back."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import byte_level_tokenizer

from cqil_dist.model.step import Segment
from cqil_dist.runtime.detokenizer import Detokenizer
from cqil_dist.runtime.request import Request
from cqil_dist.runtime.sampler import Sampler
from cqil_dist.runtime.scheduler import ScheduledStep, Scheduler
from cqil_dist.sampling_params import SamplingParams

TOKENIZER: Any = byte_level_tokenizer()


def request(prompt_length: int, first: int = 1) -> Request:
    prompt = list(range(first, first + prompt_length))
    params = SamplingParams()
    return Request(prompt, params, Sampler(params, prompt), Detokenizer(TOKENIZER, prompt), ())


def compute(step: ScheduledStep) -> None:
    """What the engine does with a step, as far as the scheduler sees it."""
    for segment, request in zip(step.segments, step.requests, strict=True):
        request.computed = segment.end
        if segment.wants_logits:
            request.tokens.append(7)


def run(scheduler: Scheduler) -> tuple[Segment, ...]:
    step = scheduler.schedule()
    assert step is not None
    compute(step)
    return step.segments


def test_nothing_to_do_is_no_step() -> None:
    assert Scheduler(slots=2, prefill_tokens=8).schedule() is None


def test_a_prompt_longer_than_a_step_is_computed_in_chunks_beside_who_decodes() -> None:
    scheduler = Scheduler(slots=2, prefill_tokens=8)
    scheduler.add(request(3))
    assert run(scheduler) == (Segment(0, 0, 3, True),)
    scheduler.add(request(20))
    assert run(scheduler) == (Segment(0, 3, 1, True), Segment(1, 0, 8, False))
    assert run(scheduler) == (Segment(0, 4, 1, True), Segment(1, 8, 8, False))
    assert run(scheduler) == (Segment(0, 5, 1, True), Segment(1, 16, 4, True))
    assert run(scheduler) == (Segment(0, 6, 1, True), Segment(1, 20, 1, True))


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    scheduler = Scheduler(slots=3, prefill_tokens=8)
    for length in (5, 6, 1):
        scheduler.add(request(length))
    # A prompt of one token costs what a decoded one does.
    assert run(scheduler) == (
        Segment(2, 0, 1, True),
        Segment(0, 0, 5, True),
        Segment(1, 0, 3, False),
    )


def test_tokens_of_a_step_are_those_of_its_segments() -> None:
    scheduler = Scheduler(slots=2, prefill_tokens=4)
    scheduler.add(request(6, first=10))
    scheduler.add(request(1, first=50))
    step = scheduler.schedule()
    assert step is not None
    assert step.token_ids == [50, 10, 11, 12, 13]
    compute(step)
    step = scheduler.schedule()
    assert step is not None
    assert step.token_ids == [7, 14, 15]


def test_more_requests_than_slots_wait_and_are_counted() -> None:
    scheduler = Scheduler(slots=2, prefill_tokens=8)
    requests = [request(1) for _ in range(4)]
    for each in requests:
        scheduler.add(each)
    run(scheduler)
    assert (scheduler.running, scheduler.waiting, scheduler.free_slots) == (2, 2, 0)
    scheduler.remove(requests[0])
    assert scheduler.free_slots == 1
    # The next in line takes the slot that came free.
    assert run(scheduler) == (Segment(0, 0, 1, True), Segment(1, 1, 1, True))
    assert requests[2].slot == 0
    assert (scheduler.running, scheduler.waiting, scheduler.free_slots) == (2, 1, 0)


@pytest.mark.parametrize("state", ["waiting", "running", "gone"])
def test_a_request_can_be_removed_at_any_time_and_twice(state: str) -> None:
    scheduler = Scheduler(slots=1, prefill_tokens=8)
    each = request(3)
    if state != "gone":
        scheduler.add(each)
    if state == "running":
        run(scheduler)
    scheduler.remove(each)
    scheduler.remove(each)
    assert (scheduler.running, scheduler.waiting, scheduler.free_slots) == (0, 0, 1)
    assert scheduler.schedule() is None


def test_drain_gives_back_all_requests_and_slots() -> None:
    scheduler = Scheduler(slots=1, prefill_tokens=8)
    requests = [request(3), request(2), request(1)]
    for each in requests:
        scheduler.add(each)
    run(scheduler)
    assert scheduler.drain() == requests
    assert (scheduler.running, scheduler.waiting, scheduler.free_slots) == (0, 0, 1)


def test_a_request_whose_cache_was_lost_computes_all_its_tokens_again() -> None:
    scheduler = Scheduler(slots=1, prefill_tokens=8)
    each = request(3)
    scheduler.add(each)
    for _ in range(3):
        run(scheduler)
    each.computed = 0
    assert run(scheduler) == (Segment(0, 0, 6, True),)


@given(
    slots=st.integers(1, 4),
    budget=st.integers(1, 9),
    arrivals=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=8
    ),
)
def test_every_request_is_computed_once_in_order_and_nobody_who_decodes_waits(
    slots: int, budget: int, arrivals: list[tuple[int, int, int]]
) -> None:
    """`arrivals`: steps after the one before, prompt length, tokens to generate."""
    scheduler = Scheduler(slots, budget)
    coming = deque((wait, request(length), length + out) for wait, length, out in arrivals)
    goals = {id(each): goal for _, each, goal in coming}
    admitted: list[Request] = []
    due = coming[0][0]
    for now in range(1000):
        while coming and due <= now:
            scheduler.add(coming.popleft()[1])
            due = now + (coming[0][0] if coming else 0)
        decoding = {id(r) for r in admitted if r.slot is not None and r.pending == 1}
        step = scheduler.schedule()
        if step is None:
            if not coming:
                break
            continue
        admitted += [each for each in step.requests if each not in admitted]
        assert decoding <= {id(each) for each in step.requests}
        assert len(step.segments) <= slots
        assert len({segment.slot for segment in step.segments}) == len(step.segments)
        assert sum(s.count for s in step.segments) <= slots + budget
        assert len(step.token_ids) == sum(s.count for s in step.segments)
        for segment, each in zip(step.segments, step.requests, strict=True):
            assert (segment.slot, segment.start) == (each.slot, each.computed)
            assert segment.wants_logits == (segment.end == len(each.tokens))
        compute(step)
        for each in step.requests:
            if len(each.tokens) == goals[id(each)]:
                scheduler.remove(each)
    else:
        raise AssertionError("requests are left after 1000 steps")
    assert len(admitted) == len(arrivals)
    assert scheduler.free_slots == slots
