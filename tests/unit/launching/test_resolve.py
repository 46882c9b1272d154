"""What follows from a launch config and its model together."""

from __future__ import annotations

import pytest
from helpers.tiny_models import TinyModelFactory

from cqil_dist.errors import LaunchError
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.launching.resolve import ResolvedLaunch
from cqil_dist.progress import SilentProgress


def test_layers_are_not_split_over_a_single_rank_that_nobody_asked_for(
    tiny_model: TinyModelFactory,
) -> None:
    """The sequential plan takes one rank by itself, on which --ungrouped shard would do nothing."""
    path = str(tiny_model().path)
    with pytest.raises(LaunchError, match="say with ranks over how many to split the layers"):
        ResolvedLaunch.of(LaunchConfig(path, ungrouped="shard"), SilentProgress())
    alone = ResolvedLaunch.of(LaunchConfig(path, ranks=1, ungrouped="shard"), SilentProgress())
    assert alone.assignment.rounds == 0
    pair = ResolvedLaunch.of(LaunchConfig(path, ranks=2, ungrouped="shard"), SilentProgress())
    assert pair.assignment.rounds == 2 * pair.model.num_layers


def test_a_plan_to_compare_with_is_noted_where_its_layers_lie_in_another_form(
    tiny_model: TinyModelFactory,
) -> None:
    path = str(tiny_model().path)

    def note(ungrouped: str) -> str | None:
        config = LaunchConfig(path, "P2 S1 E5 D1", 2, "sequential", ungrouped=ungrouped)
        return ResolvedLaunch.of(config, SilentProgress()).compared_note

    assert note("own") is None
    assert "layers 1-4 of the plan to compare with" in (note("shard") or "")
