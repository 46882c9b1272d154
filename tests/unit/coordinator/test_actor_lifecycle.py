"""What becomes of an actor after all that may be learned of it."""

from __future__ import annotations

import pytest

from cqil_dist.coordinator.lifecycle import (
    Event,
    Lifecycle,
    Unfit,
    after,
    has_answered,
    is_stuck,
    may_become_rank,
)
from cqil_dist.errors import CheckpointError

STARTING, RUNNING, READY, GONE = Lifecycle
UNFIT = Unfit(CheckpointError("a tensor is missing"))
STATES: tuple[Lifecycle | Unfit, ...] = (STARTING, RUNNING, READY, GONE, UNFIT)

NEXT: dict[Event | Unfit, tuple[Lifecycle | Unfit, ...]] = {
    # after:              STARTING  RUNNING   READY     GONE  UNFIT
    Event.ANSWERED: (RUNNING, RUNNING, READY, GONE, UNFIT),
    Event.ANSWERED_ANEW: (RUNNING, RUNNING, RUNNING, GONE, RUNNING),
    Event.ENDED: (STARTING, STARTING, STARTING, GONE, STARTING),
    Event.GIVEN_UP: (GONE, GONE, GONE, GONE, GONE),
    Event.PREPARED: (STARTING, READY, READY, GONE, UNFIT),
    Event.UNPREPARED: (STARTING, RUNNING, RUNNING, GONE, UNFIT),
    UNFIT: (UNFIT, UNFIT, UNFIT, GONE, UNFIT),
}


def test_the_table_has_every_event() -> None:
    assert NEXT.keys() == {*Event, UNFIT}


@pytest.mark.parametrize("event", NEXT, ids=str)
def test_every_event_leads_from_every_state_to_one(event: Event | Unfit) -> None:
    assert tuple(after(state, event) for state in STATES) == NEXT[event]


@pytest.mark.parametrize(
    ("events", "may"),
    [
        pytest.param([Event.ANSWERED_ANEW], True, id="an actor that answers"),
        pytest.param([], True, id="an actor that starts"),
        pytest.param([Event.ANSWERED_ANEW, Event.ENDED], True, id="an actor whose process ended"),
        pytest.param([Event.ANSWERED_ANEW, UNFIT], False, id="one that cannot read the model"),
        pytest.param(
            [UNFIT, Event.ANSWERED], False, id="one that cannot read the model, asked once more"
        ),
        pytest.param([UNFIT, Event.ANSWERED_ANEW], True, id="the next process of such a one"),
        pytest.param([Event.GIVEN_UP], False, id="an actor that Ray has given up"),
        pytest.param(
            [Event.GIVEN_UP, Event.ANSWERED_ANEW], False, id="an answer that came too late"
        ),
    ],
)
def test_who_may_become_a_rank(events: list[Event | Unfit], may: bool) -> None:
    state: Lifecycle | Unfit = STARTING
    for event in events:
        state = after(state, event)
    assert may_become_rank(state) is may


@pytest.mark.parametrize(
    ("state", "silent_s", "stuck"),
    [
        pytest.param(RUNNING, 0.9, False, id="a rank has a second to answer"),
        pytest.param(RUNNING, 1.1, True, id="then its process is replaced"),
        pytest.param(READY, 1.1, True, id="so is a spare's"),
        pytest.param(UNFIT, 1.1, True, id="so is that of an actor which cannot read the model"),
        pytest.param(STARTING, 59, False, id="a process that starts may import torch for a minute"),
        pytest.param(STARTING, 61, True, id="but not longer"),
        pytest.param(GONE, 1e9, False, id="where Ray starts none, there is none to replace"),
    ],
)
def test_a_silent_process_is_replaced_in_time(
    state: Lifecycle | Unfit, silent_s: float, stuck: bool
) -> None:
    assert is_stuck(state, silent_s, answer_s=1.0) is stuck


def test_only_processes_that_have_answered_are_missed_at_once() -> None:
    assert [has_answered(state) for state in STATES] == [False, True, True, False, True]
