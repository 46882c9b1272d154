"""Which actor becomes which rank, whom recovery waits for, and what it gives up with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqil_dist.coordinator.lifecycle import Lifecycle, Unfit
from cqil_dist.coordinator.rank_matching import (
    MemberView,
    check_enough_actors,
    match_or_wait,
    match_ranks,
    unmatched,
)
from cqil_dist.errors import CheckpointError, CqilError, ModelError, RankUnavailable


def holding(*ranks: int) -> MemberView:
    """An actor that answers, and holds the weights of these ranks."""
    return MemberView(Lifecycle.RUNNING, frozenset(ranks), "10.0.0.1")


SILENT = MemberView(Lifecycle.RUNNING, None, "10.0.0.2")
STARTING = MemberView(Lifecycle.STARTING, None, "10.0.0.3")
GONE = MemberView(Lifecycle.GONE, None, "10.0.0.4")
UNFIT = MemberView(Unfit(CheckpointError("no such tensor")), frozenset(), "10.0.0.5")


def test_at_launch_ranks_go_to_actors_in_order() -> None:
    empty = frozenset[int]()
    assert match_ranks(2, {0: empty, 1: empty, 2: empty}, {}) == {0: 0, 1: 1}


def test_survivors_keep_their_ranks_and_a_restarted_actor_gets_its_own_back() -> None:
    previous = {0: 2, 1: 0, 2: 1}
    held = {0: frozenset({1}), 1: frozenset[int](), 2: frozenset({0})}
    assert match_ranks(3, held, previous) == previous


def test_a_spare_with_the_weights_comes_before_a_restarted_actor_without() -> None:
    held = {0: frozenset({0}), 1: frozenset[int](), 2: frozenset({0, 1})}
    assert match_ranks(2, held, {0: 0, 1: 1}) == {0: 0, 1: 2}


def test_a_coordinator_that_knows_nothing_goes_by_the_weights() -> None:
    """A spare holds several ranks' weights: those who hold one only are needed where they are."""
    held = {0: frozenset({0, 1}), 1: frozenset({1}), 2: frozenset({0})}
    assert match_ranks(2, held, {}) == {0: 2, 1: 1}


def test_too_few_actors_are_no_match() -> None:
    assert match_ranks(2, {1: frozenset({0})}, {0: 1, 1: 0}) is None


@given(
    world=st.integers(1, 5),
    held=st.dictionaries(st.integers(0, 7), st.frozensets(st.integers(0, 4)), max_size=8),
    previous=st.dictionaries(st.integers(0, 4), st.integers(0, 7)),
)
def test_every_rank_has_an_actor_of_its_own(
    world: int, held: dict[int, frozenset[int]], previous: dict[int, int]
) -> None:
    ranks = match_ranks(world, held, previous)
    if len(held) < world:
        assert ranks is None
    else:
        assert ranks is not None
        assert ranks.keys() == set(range(world))
        assert len(set(ranks.values())) == world
        assert set(ranks.values()) <= held.keys()


@pytest.mark.parametrize(
    ("members", "previous", "waited_s", "expected"),
    [
        pytest.param(
            [holding(), holding()], {}, 0.0, {0: 0, 1: 1}, id="all answer: nobody is waited for"
        ),
        pytest.param(
            [holding(0), STARTING],
            {0: 0, 1: 1},
            30.0,
            None,
            id="a rank without spares waits until its process has started again",
        ),
        pytest.param(
            [holding(0), STARTING, holding(0, 1)],
            {0: 0, 1: 1},
            0.2,
            None,
            id="an actor whose connection closed has a moment to answer, even if a spare is ready",
        ),
        pytest.param(
            [holding(0), STARTING, holding(0, 1)],
            {0: 0, 1: 1},
            0.4,
            {0: 0, 1: 2},
            id="then the spare takes over from one that is killed",
        ),
        pytest.param(
            [holding(0), SILENT, holding(0, 1)],
            {0: 0, 1: 1},
            0.4,
            {0: 0, 1: 2},
            id="and from one that is stuck",
        ),
        pytest.param(
            [holding(0), SILENT, holding()],
            {0: 0, 1: 1},
            0.9,
            None,
            id="a slow survivor is waited for if a spare would have to read its weights",
        ),
        pytest.param(
            [holding(0), STARTING, holding()],
            {0: 0, 1: 1},
            0.4,
            {0: 0, 1: 2},
            id="a process that has ended holds none: a spare reads them at once",
        ),
        pytest.param(
            [holding(0), holding(1), SILENT],
            {0: 0, 1: 1},
            0.4,
            {0: 0, 1: 1},
            id="a stuck spare keeps nobody waiting",
        ),
        pytest.param(
            [holding(0), GONE, holding()],
            {0: 0, 1: 1},
            0.0,
            {0: 0, 1: 2},
            id="an actor that Ray has given up is not waited for at all",
        ),
        pytest.param(
            [UNFIT, holding(), holding()],
            {0: 0, 1: 1},
            0.0,
            {0: 2, 1: 1},
            id="an actor that cannot read the model becomes no rank",
        ),
    ],
)
def test_recovery_waits_for_whom_it_is_worth(
    members: list[MemberView],
    previous: dict[int, int],
    waited_s: float,
    expected: dict[int, int] | None,
) -> None:
    assert match_or_wait(2, members, previous, waited_s) == expected


def test_only_a_process_that_has_answered_before_is_replaced_for_its_silence() -> None:
    members = (SILENT, holding(0), STARTING, GONE, UNFIT)
    assert [member.is_silent for member in members] == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("members", "previous", "expected"),
    [
        pytest.param(
            [holding(0), STARTING],
            {0: 0, 1: 1},
            "rank 1 (was on 10.0.0.3)",
            id="a lost rank is named with its node",
        ),
        pytest.param(
            [UNFIT, STARTING],
            {0: 0, 1: 1},
            "rank 0 (was on 10.0.0.5), rank 1 (was on 10.0.0.3)",
            id="so is one whose actor cannot read the model",
        ),
        pytest.param([holding(0), STARTING], {}, "rank 1", id="at launch there is no node to name"),
    ],
)
def test_the_status_says_what_is_waited_for(
    members: list[MemberView], previous: dict[int, int], expected: str
) -> None:
    assert unmatched(2, members, previous) == expected


@pytest.mark.parametrize(
    ("members", "is_over", "error", "match"),
    [
        pytest.param([holding(0), STARTING], False, None, "", id="there is time: go on"),
        pytest.param(
            [holding(0), STARTING],
            True,
            RankUnavailable,
            r"no actor for rank 1 within 4 s: 1 of 2 actors answer and 2 are needed",
            id="time is over: the error names the rank",
        ),
        pytest.param(
            [holding(0), GONE],
            False,
            RankUnavailable,
            "add a node, or launch again with fewer ranks",
            id="too few actors are left: nobody waits for the end of the time",
        ),
        pytest.param(
            [UNFIT, holding(0)],
            False,
            ModelError,
            "no such tensor",
            id="too few can read the model: the error is the model's",
        ),
        pytest.param(
            [UNFIT, holding(0), STARTING],
            False,
            None,
            "",
            id="another actor may be able to read the model: go on",
        ),
    ],
)
def test_giving_up_says_why(
    members: list[MemberView], is_over: bool, error: type[CqilError] | None, match: str
) -> None:
    if error is None:
        check_enough_actors(2, members, "rank 1", is_over, timeout_s=4)
    else:
        with pytest.raises(error, match=match):
            check_enough_actors(2, members, "rank 1", is_over, timeout_s=4)
