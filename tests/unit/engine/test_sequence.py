"""Which logits a sequence wants of which of its tokens."""

from __future__ import annotations

import pytest

from cqil_dist.engine.sequence import Sequence
from cqil_dist.model.step import Segment


def in_slot(length: int, *, scores_prompt: bool = False) -> Sequence:
    sequence = Sequence(range(length), scores_prompt=scores_prompt)
    sequence.slot = 3
    return sequence


def test_logits_are_wanted_after_the_last_token_alone() -> None:
    sequence = in_slot(5)
    assert sequence.segment(4) == Segment(3, 0, 4, wanted_logits=0)
    sequence.computed = 4
    assert sequence.segment(1) == Segment(3, 4, 1, wanted_logits=1)
    sequence.computed = 5
    sequence.append(9)
    assert sequence.segment(1) == Segment(3, 5, 1, wanted_logits=1)


@pytest.mark.parametrize("replayed", [0, 3])
def test_a_prompt_that_is_scored_wants_them_after_each_of_its_tokens(replayed: int) -> None:
    """Once each, also where the cache is lost; and of tokens that are replayed, after the last."""
    sequence = in_slot(6, scores_prompt=True)
    for token_id in range(replayed):
        sequence.append(token_id)
    assert sequence.segment(4) == Segment(3, 0, 4, wanted_logits=4)
    sequence.computed, sequence.unscored = 4, 1
    rest = sequence.pending
    assert sequence.segment(rest) == Segment(3, 4, rest, wanted_logits=rest)
    sequence.computed = 0  # the cache is lost
    assert sequence.segment(5) == Segment(3, 0, 5, wanted_logits=1)
    sequence.unscored = 0
    assert sequence.segment(6 + replayed) == Segment(3, 0, 6 + replayed, wanted_logits=1)


def test_a_token_gained_makes_up_for_setbacks() -> None:
    sequence = in_slot(2)
    sequence.setbacks = 4
    sequence.append(7)
    assert (sequence.setbacks, sequence.token_ids, sequence.prompt_length) == (0, [0, 1, 7], 2)
