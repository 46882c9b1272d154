"""Which actor becomes which rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cqil_dist.coordinator.rank_matching import match_ranks
from cqil_dist.rank.mesh_spec import ActorState


def actor(*ranks: int) -> ActorState:
    """One that answers, and holds the weights of these ranks."""
    return ActorState("node", 1, (0,), None, 0, frozenset(ranks))


def test_at_launch_ranks_are_seated_in_order() -> None:
    assert match_ranks(2, {0: actor(), 1: actor(), 2: actor()}, {}) == {0: 0, 1: 1}


def test_survivors_keep_their_ranks_and_a_restarted_actor_gets_its_own_back() -> None:
    previous = {0: 2, 1: 0, 2: 1}
    states = {0: actor(1), 1: actor(), 2: actor(0)}
    assert match_ranks(3, states, previous) == previous


def test_a_spare_with_the_weights_comes_before_a_restarted_actor_without() -> None:
    states = {0: actor(0), 1: actor(), 2: actor(0, 1)}
    assert match_ranks(2, states, {0: 0, 1: 1}) == {0: 0, 1: 2}


def test_a_coordinator_that_knows_nothing_goes_by_the_weights() -> None:
    """A spare holds several ranks' weights: those who hold one only are needed where they are."""
    states = {0: actor(0, 1), 1: actor(1), 2: actor(0)}
    assert match_ranks(2, states, {}) == {0: 2, 1: 1}


def test_too_few_actors_are_no_seating() -> None:
    assert match_ranks(2, {1: actor(0)}, {0: 1, 1: 0}) is None


@given(
    world=st.integers(1, 5),
    holdings=st.dictionaries(st.integers(0, 7), st.frozensets(st.integers(0, 4)), max_size=8),
    previous=st.dictionaries(st.integers(0, 4), st.integers(0, 7)),
)
def test_every_rank_has_an_actor_of_its_own(
    world: int, holdings: dict[int, frozenset[int]], previous: dict[int, int]
) -> None:
    states = {index: actor(*ranks) for index, ranks in holdings.items()}
    seats = match_ranks(world, states, previous)
    if len(states) < world:
        assert seats is None
    else:
        assert seats is not None
        assert seats.keys() == set(range(world))
        assert len(set(seats.values())) == world
        assert set(seats.values()) <= states.keys()
