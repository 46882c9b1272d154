"""Whoever decodes goes on in every step, prompts fill what is left, and slots come back."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqil_dist.engine.scheduler import ScheduledStep, Scheduler
from cqil_dist.engine.sequence import Sequence
from cqil_dist.engine.slot_pool import SlotPool
from cqil_dist.model.step import Segment


def sequence(
    prompt_length: int, first: int = 1, plan_index: int = 0, scores_prompt: bool = False
) -> Sequence:
    prompt = range(first, first + prompt_length)
    return Sequence(prompt, plan_index, scores_prompt=scores_prompt)


def compute(scheduled: ScheduledStep) -> None:
    """What the engine does with a step, as far as the scheduler sees it."""
    for segment, sequence in zip(scheduled.step.segments, scheduled.sequences, strict=True):
        sequence.computed = segment.start + segment.count
        if segment.wanted_logits and sequence.pending == 0:
            sequence.append(7)


def run(scheduler: Scheduler) -> tuple[Segment, ...]:
    scheduled = scheduler.schedule()
    assert scheduled is not None
    compute(scheduled)
    return scheduled.step.segments


def test_nothing_to_do_is_no_step() -> None:
    assert Scheduler(SlotPool(2), prefill_tokens=8).schedule() is None


def test_a_prompt_longer_than_a_step_is_computed_in_chunks_beside_who_decodes() -> None:
    scheduler = Scheduler(SlotPool(2), prefill_tokens=8)
    scheduler.add(sequence(3))
    assert run(scheduler) == (Segment(0, 0, 3, 1),)
    scheduler.add(sequence(20))
    assert run(scheduler) == (Segment(0, 3, 1, 1), Segment(1, 0, 8, 0))
    assert run(scheduler) == (Segment(0, 4, 1, 1), Segment(1, 8, 8, 0))
    assert run(scheduler) == (Segment(0, 5, 1, 1), Segment(1, 16, 4, 1))
    assert run(scheduler) == (Segment(0, 6, 1, 1), Segment(1, 20, 1, 1))


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    scheduler = Scheduler(SlotPool(3), prefill_tokens=8)
    for length in (5, 6, 1):
        scheduler.add(sequence(length))
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
    scheduler = Scheduler(SlotPool(4), prefill_tokens=9)
    scheduler.add(sequence(100))
    assert run(scheduler) == (Segment(0, 0, 9, 0),)
    scheduler.add(sequence(50))
    scheduler.add(sequence(3))
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
    scheduler = Scheduler(SlotPool(2), prefill_tokens=10)
    for length in (30, 2):
        scheduler.add(sequence(length))
    assert run(scheduler) == (Segment(0, 0, 8, 0), Segment(1, 0, 2, 1))


@given(
    budget=st.integers(2, 16),
    arrivals=st.lists(st.lists(st.integers(1, 12), max_size=3), min_size=1, max_size=20),
)
def test_neither_a_long_prompt_nor_many_short_ones_starve_the_others(
    budget: int, arrivals: list[list[int]]
) -> None:
    """`arrivals`: lengths of the prompts that come behind the long one, before each step."""
    scheduler = Scheduler(SlotPool(1 + sum(map(len, arrivals))), prefill_tokens=budget)
    long, shorts = sequence(1000), [[sequence(length) for length in step] for step in arrivals]
    scheduler.add(long)
    behind: list[Sequence] = []
    for coming in shorts:
        for each in coming:
            scheduler.add(each)
        behind += coming
        needs = {each: each.pending for each in (long, *behind) if each.pending > 1}
        scheduled = scheduler.schedule()
        assert scheduled is not None
        segments = scheduled.step.segments
        counts = {r: s.count for r, s in zip(scheduled.sequences, segments, strict=True)}
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


def test_sequences_of_two_plans_take_turns() -> None:
    """Also where one of them decodes and the other's prompt is long."""
    scheduler = Scheduler(SlotPool(3), prefill_tokens=4)
    scheduler.add(sequence(1, plan_index=1))
    assert run(scheduler) == (Segment(0, 0, 1, 1),)
    scheduler.add(sequence(9, plan_index=0))
    scheduler.add(sequence(2, plan_index=1))
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
    scheduler = Scheduler(SlotPool(6), prefill_tokens=4)
    goals: dict[Sequence, int] = {}
    for plan, length, out in zip(plans, lengths, outputs, strict=False):
        each = sequence(length, plan_index=plan)
        goals[each] = length + out
        scheduler.add(each)
    latest: list[int] = []
    while goals:
        scheduled = scheduler.schedule()
        assert scheduled is not None
        assert {each.plan_index for each in scheduled.sequences} == {scheduled.step.plan_index}
        unfinished = {each.plan_index for each in goals}
        # Of n plans with work, each has one of n steps.
        recent = latest[-(len(unfinished) - 1) :] if len(unfinished) > 1 else []
        assert scheduled.step.plan_index not in recent
        latest.append(scheduled.step.plan_index)
        compute(scheduled)
        for each in scheduled.sequences:
            if len(each.token_ids) == goals[each]:
                scheduler.remove(each)
                del goals[each]


def test_whoever_wants_its_prompt_s_logprobs_gets_logits_after_each_of_its_tokens() -> None:
    scheduler = Scheduler(SlotPool(2), prefill_tokens=4)
    scheduler.add(sequence(6, scores_prompt=True))
    scheduler.add(sequence(3))
    assert run(scheduler) == (Segment(0, 0, 2, 2), Segment(1, 0, 2, 0))


def test_tokens_of_a_step_are_those_of_its_segments() -> None:
    scheduler = Scheduler(SlotPool(2), prefill_tokens=4)
    scheduler.add(sequence(6, first=10))
    scheduler.add(sequence(1, first=50))
    scheduled = scheduler.schedule()
    assert scheduled is not None
    assert scheduled.step.token_ids == (50, 10, 11, 12, 13)
    compute(scheduled)
    scheduled = scheduler.schedule()
    assert scheduled is not None
    assert scheduled.step.token_ids == (7, 14, 15)


def test_more_sequences_than_slots_wait_and_are_counted() -> None:
    slots = SlotPool(2)
    scheduler = Scheduler(slots, prefill_tokens=8)
    sequences = [sequence(1) for _ in range(4)]
    for each in sequences:
        scheduler.add(each)
    run(scheduler)
    assert (scheduler.running, scheduler.waiting, slots.free) == (2, 2, 0)
    scheduler.remove(sequences[0])
    assert slots.free == 1
    # The next in line takes the slot that came free.
    assert run(scheduler) == (Segment(0, 0, 1, 1), Segment(1, 1, 1, 1))
    assert sequences[2].slot == 0
    assert (scheduler.running, scheduler.waiting, slots.free) == (2, 1, 0)


@pytest.mark.parametrize("state", ["waiting", "running", "gone"])
def test_a_sequence_can_be_removed_at_any_time_and_twice(state: str) -> None:
    slots = SlotPool(1)
    scheduler = Scheduler(slots, prefill_tokens=8)
    each = sequence(3)
    if state != "gone":
        scheduler.add(each)
    if state == "running":
        run(scheduler)
    scheduler.remove(each)
    scheduler.remove(each)
    assert (scheduler.running, scheduler.waiting, slots.free) == (0, 0, 1)
    assert scheduler.schedule() is None


def test_drain_gives_back_all_sequences_and_slots() -> None:
    slots = SlotPool(1)
    scheduler = Scheduler(slots, prefill_tokens=8)
    sequences = [sequence(3), sequence(2), sequence(1)]
    for each in sequences:
        scheduler.add(each)
    run(scheduler)
    assert scheduler.drain() == sequences
    assert (scheduler.running, scheduler.waiting, slots.free) == (0, 0, 1)


def test_a_sequence_whose_cache_was_lost_computes_all_its_tokens_again() -> None:
    slots = SlotPool(1)
    scheduler = Scheduler(slots, prefill_tokens=8)
    scheduler.add(sequence(3))
    for _ in range(3):
        run(scheduler)
    slots.lose_cache()
    assert run(scheduler) == (Segment(0, 0, 6, 1),)


@given(
    slots=st.integers(1, 4),
    budget=st.integers(1, 9),
    arrivals=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=8
    ),
)
def test_every_sequence_is_computed_once_in_order_and_nobody_who_decodes_waits(
    slots: int, budget: int, arrivals: list[tuple[int, int, int]]
) -> None:
    """`arrivals`: steps after the one before, prompt length, tokens to generate."""
    pool = SlotPool(slots)
    scheduler = Scheduler(pool, budget)
    coming = deque((wait, sequence(length), length + out) for wait, length, out in arrivals)
    goals = {id(each): goal for _, each, goal in coming}
    admitted: list[Sequence] = []
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
        admitted += [each for each in scheduled.sequences if each not in admitted]
        assert decoding <= {id(each) for each in scheduled.sequences}
        assert len(step.segments) <= slots
        assert len({segment.slot for segment in step.segments}) == len(step.segments)
        assert sum(s.count for s in step.segments) <= slots + budget
        assert len(step.token_ids) == sum(s.count for s in step.segments)
        for segment, each in zip(step.segments, scheduled.sequences, strict=True):
            assert (segment.slot, segment.start) == (each.slot, each.computed)
            assert segment.wanted_logits == int(
                segment.start + segment.count == len(each.token_ids)
            )
        compute(scheduled)
        for each in scheduled.sequences:
            if len(each.token_ids) == goals[id(each)]:
                scheduler.remove(each)
    else:
        raise AssertionError("sequences are left after 1000 steps")
    assert len(admitted) == len(arrivals)
    assert pool.free == slots
