"""Named plans: there for the built-in model, explained for every other."""

from __future__ import annotations

import json
from importlib import resources

import pytest

import cqil_dist.recommended
from cqil_dist.errors import PlanError
from cqil_dist.plan import Plan
from cqil_dist.recommended.index import NAMES, plan_for
from cqil_dist.store.builtin import BUILTIN_MODELS


@pytest.mark.parametrize("model", BUILTIN_MODELS)
def test_built_in_models_have_all_three_and_say_what_they_cost(model: str) -> None:
    plans = [plan_for(name, model, 30) for name in NAMES]
    depths = [plan.depth for plan in plans]
    assert depths == sorted(depths)
    assert depths[0] < depths[-1] < 30
    losses = []
    for name in NAMES:
        file = resources.files(cqil_dist.recommended) / model / f"{name}.json"
        measured = json.loads(file.read_text(encoding="utf-8"))["measured"]
        assert measured["text"]
        losses.append(measured["perplexity"] / measured["original_perplexity"])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] > 1


@pytest.mark.parametrize("model", ["org/name", "/a/directory", "other", "../recommended/smollm2"])
def test_other_models_are_told_the_command(model: str) -> None:
    with pytest.raises(PlanError, match=r"cqil plan search --model .* -o balanced\.json"):
        plan_for("balanced", model, 30)


def test_any_other_plan_is_read_as_ever() -> None:
    assert plan_for("P2 S0 E6 D1", "other", 6) == Plan.parse("P2 S0 E6 D1", 6)
    plan = Plan.sequential(6)
    assert plan_for(plan, "smollm2-135m", 6) is plan
