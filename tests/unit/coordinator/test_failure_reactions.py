"""What a failed load, join or preparation leads to."""

from __future__ import annotations

import pytest

from cqil_dist.coordinator.failure_reactions import (
    Failure,
    Preparation,
    Reaction,
    SpareAction,
    gives_up,
    next_for_spare,
    reaction_to,
)
from cqil_dist.coordinator.lifecycle import Lifecycle, Unfit
from cqil_dist.errors import CheckpointError


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        pytest.param(
            Failure.REFUSED, Reaction.RAISE, id="cores that cannot be bound fail the launch"
        ),
        pytest.param(
            Failure.RANK_LOST, Reaction.RETRY, id="a rank lost while others load is recovered from"
        ),
        pytest.param(
            Failure.CANNOT_READ, Reaction.MARK_UNFIT, id="a node without the model gets no rank"
        ),
        pytest.param(
            Failure.ACTOR_FAILED, Reaction.REPLACE, id="a process out of memory is started again"
        ),
        pytest.param(
            Failure.UNFORESEEN, Reaction.RETRY, id="an error of the coordinator's is tried again"
        ),
    ],
)
def test_every_failure_has_one_reaction(failure: Failure, expected: Reaction) -> None:
    assert reaction_to(failure) is expected


@pytest.mark.parametrize(
    ("failures", "is_over", "expected"),
    [
        pytest.param([Failure.RANK_LOST] * 9, False, False, id="losses are made good in time"),
        pytest.param([Failure.RANK_LOST], True, True, id="but no longer"),
        pytest.param([Failure.CANNOT_READ] * 3, False, False, id="nodes are tried in turn"),
        pytest.param([Failure.ACTOR_FAILED] * 2, False, False, id="a process may fail twice"),
        pytest.param([Failure.ACTOR_FAILED] * 3, False, True, id="and not three times"),
        pytest.param(
            [Failure.UNFORESEEN, Failure.ACTOR_FAILED, Failure.RANK_LOST, Failure.UNFORESEEN],
            False,
            True,
            id="whatever nobody foresaw counts",
        ),
    ],
)
def test_tries_end(failures: list[Failure], is_over: bool, expected: bool) -> None:
    assert gives_up(failures, is_over) is expected


UNFIT = Unfit(CheckpointError("no such tensor"))


@pytest.mark.parametrize(
    ("state", "preparation", "expected"),
    [
        pytest.param(
            Lifecycle.RUNNING,
            Preparation.NONE,
            SpareAction.PREPARE,
            id="a spare that lacks weights reads them, as soon as memory allows",
        ),
        pytest.param(
            Lifecycle.STARTING,
            Preparation.NONE,
            SpareAction.PREPARE,
            id="one that has started anew reads them again",
        ),
        pytest.param(
            Lifecycle.RUNNING,
            Preparation.UNDER_WAY,
            SpareAction.WAIT,
            id="one that reads is not called twice",
        ),
        pytest.param(
            Lifecycle.RUNNING,
            Preparation.CANNOT_READ,
            SpareAction.MARK_UNFIT,
            id="one on a node without the model gets no rank",
        ),
    ],
)
def test_a_spare_reads_what_it_lacks(
    state: Lifecycle, preparation: Preparation, expected: SpareAction
) -> None:
    assert next_for_spare(state, preparation) is expected


@pytest.mark.parametrize("preparation", Preparation)
@pytest.mark.parametrize("state", [Lifecycle.READY, Lifecycle.GONE, UNFIT])
def test_a_spare_that_is_ready_or_of_no_use_is_left_alone(
    state: Lifecycle | Unfit, preparation: Preparation
) -> None:
    assert next_for_spare(state, preparation) is SpareAction.LEAVE
