"""Keeps actors without a rank ready to become any, while the ranks serve.

What to do with a spare is coordinator/failure_reactions.py's decision.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import ray
from ray.exceptions import RayError, RayTaskError

from cqil_dist.coordinator.actor_calls import as_raised
from cqil_dist.coordinator.failure_reactions import Preparation, SpareAction, next_for_spare
from cqil_dist.coordinator.lifecycle import Event
from cqil_dist.coordinator.pool_member import PoolMember, Question, read_answers, replace_stuck
from cqil_dist.coordinator.rank_loading import LOADING_ANSWER_S
from cqil_dist.errors import ModelError
from cqil_dist.rank.spec import EngineSpec

logger = logging.getLogger(__name__)


def look_after_spares(
    spares: Sequence[PoolMember], members: Sequence[PoolMember], spec: EngineSpec
) -> None:
    """Have spares read the weights that they may be asked for, and replace those that are stuck.

    Called from time to time, it also finds those that have started anew, or have memory free now.

    Args:
        spares: the members without a rank.
        members: all of the pool, whose open questions are read.
    """
    for spare in spares:
        if not isinstance(spare.answer, Question):
            spare.ask()
    read_answers(members)
    replace_stuck(spares, LOADING_ANSWER_S)
    for spare in spares:
        if spare.state is not None:
            holds_all = spare.state.ranks >= frozenset(range(spec.world))
            spare.note(Event.PREPARED if holds_all else Event.UNPREPARED)
        _look_after(spare, spec)


def _look_after(spare: PoolMember, spec: EngineSpec) -> None:
    preparation, error = _preparation(spare)
    match next_for_spare(spare.lifecycle, preparation):
        case SpareAction.PREPARE:
            if error is not None:
                logger.warning("a spare reads the weights once more, because: %s", error)
            spare.preparing = spare.actor.prepare.remote(spec)
        case SpareAction.MARK_UNFIT:
            assert isinstance(error, ModelError), "that it cannot read the model"
            spare.mark_unfit(error)
            spare.preparing = None  # a later process is called anew
        case SpareAction.LEAVE | SpareAction.WAIT:
            return


def _preparation(spare: PoolMember) -> tuple[Preparation, Exception | None]:
    """Look at a spare's latest call to read weights, and at what it has failed with."""
    if spare.preparing is None:
        return Preparation.NONE, None
    if not ray.wait([spare.preparing], timeout=0)[0]:
        return Preparation.UNDER_WAY, None
    try:
        ray.get(spare.preparing)
    except RayError as error:
        raised = as_raised(error) if isinstance(error, RayTaskError) else error
        cannot_read = isinstance(raised, ModelError)
        return (Preparation.CANNOT_READ if cannot_read else Preparation.NONE), raised
    return Preparation.NONE, None
