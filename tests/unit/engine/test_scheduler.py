"""Whoever decodes goes on in every step, prompts fill what is left, and slots come back."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from helpers.tiny_models import byte_level_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from cqil_dist.engine.detokenizer import Detokenizer
from cqil_dist.engine.request import Request
from cqil_dist.engine.sampler import Sampler
from cqil_dist.engine.scheduler import ScheduledStep, Scheduler
from cqil_dist.inputs import GenerationInput
from cqil_dist.model.step import Segment
from cqil_dist.sampling_params import SamplingParams

TOKENIZER: Any = byte_level_tokenizer()


def request(
    prompt_length: int, first: int = 1, plan: int = 0, prompt_logprobs: int | None = None
) -> Request:
    prompt = list(range(first, first + prompt_length))
    given = GenerationInput(prompt, SamplingParams(prompt_logprobs=prompt_logprobs), plan)
    sampler = Sampler(given.params, prompt)
    return Request(given, prompt, sampler, Detokenizer(TOKENIZER, prompt), (), 4096)


def compute(scheduled: ScheduledStep) -> None:
    """What the engine does with a step, as far as the scheduler sees it."""
    for segment, request in zip(scheduled.step.segments, scheduled.requests, strict=True):
        request.computed = segment.end
        if segment.logits and request.pending == 0:
            request.tokens.append(7)


def run(scheduler: Scheduler) -> tuple[Segment, ...]:
    scheduled = scheduler.schedule()
    assert scheduled is not None
    compute(scheduled)
    return scheduled.step.segments


def test_nothing_to_do_is_no_step() -> None:
    assert Scheduler(slots=2, prefill_tokens=8).schedule() is None


def test_a_prompt_longer_than_a_step_is_computed_in_chunks_beside_who_decodes() -> None:
    scheduler = Scheduler(slots=2, prefill_tokens=8)
    scheduler.add(request(3))
    assert run(scheduler) == (Segment(0, 0, 3, 1),)
    scheduler.add(request(20))
    assert run(scheduler) == (Segment(0, 3, 1, 1), Segment(1, 0, 8, 0))
    assert run(scheduler) == (Segment(0, 4, 1, 1), Segment(1, 8, 8, 0))
    assert run(scheduler) == (Segment(0, 5, 1, 1), Segment(1, 16, 4, 1))
    assert run(scheduler) == (Segment(0, 6, 1, 1), Segment(1, 20, 1, 1))


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    scheduler = Scheduler(slots=3, prefill_tokens=8)
    for length in (5, 6, 1):
        scheduler.add(request(length))
    # A prompt of one token costs what a decoded one does; the first has half of the rest at least.
    assert run(scheduler) == (
        Segment(2, 0, 1, 1),
        Segment(0, 0, 4, 0),
        Segment(1, 0, 4, 0),
    )
    # A prompt's last token costs no more than that either, and the next one has what is left.
    assert run(scheduler) == (
        Segment(0, 4, 1, 1),
        Segment(2, 1, 1, 1),
        Segment(1, 4, 2, 1),
    )


def test_a_short_prompt_behind_a_long_one_is_computed_in_the_next_step() -> None:
    scheduler = Scheduler(slots=4, prefill_tokens=9)
    scheduler.add(request(100))
    assert run(scheduler) == (Segment(0, 0, 9, 0),)
    scheduler.add(request(50))
    scheduler.add(request(3))
    # Half of nine, rounded up, is the longest waiting one's; then whoever needs least.
    assert run(scheduler) == (
        Segment(0, 9, 5, 0),
        Segment(1, 0, 1, 0),
        Segment(2, 0, 3, 1),
    )
    assert run(scheduler) == (
        Segment(2, 3, 1, 1),
        Segment(0, 14, 5, 0),
        Segment(1, 1, 4, 0),
    )


def test_what_short_prompts_leave_is_the_first_one_s_again() -> None:
    scheduler = Scheduler(slots=2, prefill_tokens=10)
    for length in (30, 2):
        scheduler.add(request(length))
    assert run(scheduler) == (Segment(0, 0, 8, 0), Segment(1, 0, 2, 1))


@given(
    budget=st.integers(2, 16),
    arrivals=st.lists(st.lists(st.integers(1, 12), max_size=3), min_size=1, max_size=20),
)
def test_neither_a_long_prompt_nor_many_short_ones_starve_the_others(
    budget: int, arrivals: list[list[int]]
) -> None:
    """`arrivals`: lengths of the prompts that come behind the long one, before each step."""
    scheduler = Scheduler(slots=1 + sum(map(len, arrivals)), prefill_tokens=budget)
    long, shorts = request(1000), [[request(length) for length in step] for step in arrivals]
    scheduler.add(long)
    behind: list[Request] = []
    for coming in shorts:
        for each in coming:
            scheduler.add(each)
        behind += coming
        needs = {each: each.pending for each in (long, *behind) if each.pending > 1}
        scheduled = scheduler.schedule()
        assert scheduled is not None
        segments = scheduled.step.segments
        counts = {r: s.count for r, s in zip(scheduled.requests, segments, strict=True)}
        compute(scheduled)
        # The long one goes on by half of the budget at least, and nothing of the budget is wasted.
        assert counts[long] >= budget / 2
        assert sum(counts.get(each, 0) for each in needs) == min(budget, sum(needs.values()))
        # Of the others, whoever fits beside it is done at once: those first that need least,
        # and of equals those that came first.
        room = budget // 2
        for each in sorted((each for each in needs if each is not long), key=needs.__getitem__):
            room -= needs[each]
            if room >= 0:
                assert counts[each] == needs[each]


def test_requests_of_two_plans_take_turns() -> None:
    """Also where one of them decodes and the other's prompt is long."""
    scheduler = Scheduler(slots=3, prefill_tokens=4)
    scheduler.add(request(1, plan=1))
    assert run(scheduler) == (Segment(0, 0, 1, 1),)
    scheduler.add(request(9, plan=0))
    scheduler.add(request(2, plan=1))
    assert run(scheduler) == (Segment(1, 0, 4, 0),)
    assert run(scheduler) == (Segment(0, 1, 1, 1), Segment(2, 0, 2, 1))
    assert run(scheduler) == (Segment(1, 4, 4, 0),)
    assert run(scheduler) == (Segment(0, 2, 1, 1), Segment(2, 2, 1, 1))


@given(
    plans=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    lengths=st.lists(st.integers(1, 12), min_size=6, max_size=6),
    outputs=st.lists(st.integers(1, 6), min_size=6, max_size=6),
)
def test_a_step_walks_one_plan_and_no_plan_twice_while_another_waits(
    plans: list[int], lengths: list[int], outputs: list[int]
) -> None:
    scheduler = Scheduler(slots=6, prefill_tokens=4)
    goals: dict[Request, int] = {}
    for plan, length, out in zip(plans, lengths, outputs, strict=False):
        each = request(length, plan=plan)
        goals[each] = length + out
        scheduler.add(each)
    latest: list[int] = []
    while goals:
        scheduled = scheduler.schedule()
        assert scheduled is not None
        assert {each.plan for each in scheduled.requests} == {scheduled.step.plan_index}
        unfinished = {each.plan for each in goals}
        # Of n plans with work, each has one of n steps.
        recent = latest[-(len(unfinished) - 1) :] if len(unfinished) > 1 else []
        assert scheduled.step.plan_index not in recent
        latest.append(scheduled.step.plan_index)
        compute(scheduled)
        for each in scheduled.requests:
            if len(each.tokens) == goals[each]:
                scheduler.remove(each)
                del goals[each]


def test_whoever_wants_its_prompt_s_logprobs_gets_logits_after_each_of_its_tokens() -> None:
    scheduler = Scheduler(slots=2, prefill_tokens=4)
    scheduler.add(request(6, prompt_logprobs=0))
    scheduler.add(request(3))
    assert run(scheduler) == (Segment(0, 0, 2, 2), Segment(1, 0, 2, 0))


def test_tokens_of_a_step_are_those_of_its_segments() -> None:
    scheduler = Scheduler(slots=2, prefill_tokens=4)
    scheduler.add(request(6, first=10))
    scheduler.add(request(1, first=50))
    scheduled = scheduler.schedule()
    assert scheduled is not None
    assert scheduled.step.token_ids == (50, 10, 11, 12, 13)
    compute(scheduled)
    scheduled = scheduler.schedule()
    assert scheduled is not None
    assert scheduled.step.token_ids == (7, 14, 15)


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
    assert run(scheduler) == (Segment(0, 0, 1, 1), Segment(1, 1, 1, 1))
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
    assert run(scheduler) == (Segment(0, 0, 6, 1),)


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
        scheduled = scheduler.schedule()
        if scheduled is None:
            if not coming:
                break
            continue
        step = scheduled.step
        admitted += [each for each in scheduled.requests if each not in admitted]
        assert decoding <= {id(each) for each in scheduled.requests}
        assert len(step.segments) <= slots
        assert len({segment.slot for segment in step.segments}) == len(step.segments)
        assert sum(s.count for s in step.segments) <= slots + budget
        assert len(step.token_ids) == sum(s.count for s in step.segments)
        for segment, each in zip(step.segments, scheduled.requests, strict=True):
            assert (segment.slot, segment.start) == (each.slot, each.computed)
            assert segment.logits == int(segment.end == len(each.tokens))
        compute(scheduled)
        for each in scheduled.requests:
            if len(each.tokens) == goals[id(each)]:
                scheduler.remove(each)
    else:
        raise AssertionError("requests are left after 1000 steps")
    assert len(admitted) == len(arrivals)
    assert scheduler.free_slots == slots
