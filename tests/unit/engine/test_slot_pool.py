"""Slots are given lowest first, and what lies in them is known until another computes there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cqil_dist.engine.sequence import Sequence
from cqil_dist.engine.slot_pool import SlotPool


def valid(pool: SlotPool, slot: int) -> tuple[int, list[int]] | None:
    """The plan and the tokens whose keys and values may be read from a slot."""
    there = pool.contents[slot]
    return None if there is None else (there.plan_index, there.token_ids[: there.computed])


@given(changes=st.lists(st.integers(0, 5), max_size=30))
def test_the_lowest_free_slot_is_given_and_no_slot_twice(changes: list[int]) -> None:
    """`changes`: which holder of a slot gives it back; where there is none, another gets one."""
    pool = SlotPool(5)
    holding: list[Sequence] = []
    for change in changes:
        if change < len(holding):
            pool.take_back(holding.pop(change))
        elif pool.free:
            sequence = Sequence([1])
            taken = {each.slot for each in holding}
            pool.give(sequence)
            assert sequence.slot == min({*range(5)} - taken)
            holding.append(sequence)
        assert pool.free == 5 - len(holding)


def test_what_a_sequence_computed_lies_in_its_slot_until_another_has_it() -> None:
    pool = SlotPool(2)
    first, second = Sequence([4, 5, 6], plan_index=1), Sequence([7])
    pool.give(first)
    assert valid(pool, 0) == (1, [])
    first.computed = 3
    first.append(8)  # sampled, not computed
    assert valid(pool, 0) == (1, [4, 5, 6])
    pool.take_back(first)
    assert first.slot is None
    assert valid(pool, 0) == (1, [4, 5, 6])
    pool.give(second)
    assert second.slot == 0
    assert valid(pool, 0) == (0, [])
    assert valid(pool, 1) is None


def test_a_lost_cache_leaves_nothing_in_any_slot_and_slots_where_they_were() -> None:
    pool = SlotPool(3)
    sequences = [Sequence([1, 2]), Sequence([3, 4])]
    for each in sequences:
        pool.give(each)
        each.computed = 2
    pool.take_back(sequences[0])
    pool.lose_cache()
    assert [valid(pool, slot) for slot in range(3)] == [(0, []), (0, []), None]
    assert (sequences[1].slot, sequences[1].pending, pool.free) == (1, 2, 2)
