"""The search finds the best plan, in cases where that is known."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.tiny_models import TinyModel, TinyModelFactory, random_tokens

from cqil_dist.assignment import assign
from cqil_dist.costs import Costs, ModelShape
from cqil_dist.errors import PlanError
from cqil_dist.plan import Bypass, Group, Plan
from cqil_dist.planning.measure.baseline import Baseline, Divergence
from cqil_dist.planning.measure.grouped_model import load_model
from cqil_dist.planning.measure.similarity import input_similarity
from cqil_dist.planning.measure.windows import Windows
from cqil_dist.planning.search import latency
from cqil_dist.planning.search.comparison import Comparison
from cqil_dist.planning.search.goal import Goal
from cqil_dist.planning.search.pareto import MeasuredPlan, PlanFinder
from cqil_dist.planning.search.search import PlanSearch, least_sensitive_plans
from cqil_dist.planning.search.sensitivity import candidates, measure_sensitivities
from cqil_dist.progress import SilentProgress
from cqil_dist.rank.layer_timing import prepare_layers

LAYERS = 8
MANY_S = 60.0


def invented(group: Group) -> float:
    """An arbitrary but constant sensitivity, which is greater for larger groups."""
    mixed = sum((3 + layer) ** 3 for layer in group.layers) * (7 + len(str(group.bypass)))
    return (1 + mixed % 101) / 100 * group.size**2


SENSITIVITIES = {group: invented(group) for group in candidates(LAYERS, 3)}


def every_plan() -> Iterator[Plan]:
    """Every plan, with the best bypass of each group."""
    for cuts in itertools.product([False, True], repeat=LAYERS - 1):
        groups: list[list[int]] = [[0]]
        for layer, cut in enumerate(cuts, start=1):
            if cut:
                groups.append([layer])
            else:
                groups[-1].append(layer)
        if max(map(len, groups)) <= 3:
            chosen = [
                min(
                    (g for g in SENSITIVITIES if g.layers == tuple(layers)),
                    key=SENSITIVITIES.__getitem__,
                    default=Group(tuple(layers)),
                )
                for layers in groups
            ]
            yield Plan(tuple(chosen), LAYERS)


def total(plan: Plan) -> float:
    return sum(SENSITIVITIES.get(group, 0.0) for group in plan.groups)


def test_each_depth_has_the_plan_of_least_sum() -> None:
    plans = least_sensitive_plans(LAYERS, SENSITIVITIES)
    assert sorted(plans) == list(range(3, LAYERS + 1))
    for depth, plan in plans.items():
        least = min(total(each) for each in every_plan() if each.depth == depth)
        assert total(plan) == pytest.approx(least)


def test_local_search_finds_a_best_plan_that_sums_do_not_show() -> None:
    """Two groups cost nothing together, though each costs much by itself; one has a bypass."""
    planted = Plan.covering([Group((1, 2), Bypass("full")), Group((5, 6, 7))], LAYERS)

    def measure(plan: Plan) -> Divergence:
        apart = len(set(plan.groups) ^ set(planted.groups))
        return Divergence(total(plan) * 0.01 + apart, 0.0)

    search = PlanSearch(LAYERS, SENSITIVITIES, measure, MANY_S, SilentProgress())
    assert search.refine(planted.depth) == planted


@pytest.mark.parametrize(
    ("start", "planted"),
    [
        ([(1, 2), (3, 4), (5, 6)], [(0, 1), (4, 5), (6, 7)]),
        ([(0, 1, 2)], [(0, 1), (4, 5)]),
    ],
)
def test_changed_groups_take_a_bypass_that_is_allowed(
    start: list[tuple[int, ...]], planted: list[tuple[int, ...]]
) -> None:
    """If a joined or split group's best bypass is not allowed, another one is taken."""
    first, best = (Plan.covering([Group(g) for g in each], LAYERS) for each in (start, planted))

    def measure(plan: Plan) -> Divergence:
        return Divergence(len(set(plan.groups) ^ set(best.groups)), 0.0)

    def without_bypass(plan: Plan) -> bool:
        return all(str(group.bypass) == "0" for group in plan.groups)

    costly = {group: kl + 9 * (str(group.bypass) == "0") for group, kl in SENSITIVITIES.items()}
    search = PlanSearch(LAYERS, costly, measure, MANY_S, SilentProgress())
    assert search.refine(best.depth, first, without_bypass) == best
    assert all(map(without_bypass, search.measured))


def test_the_search_ends_with_a_plan_that_is_enough() -> None:
    def measure(plan: Plan) -> Divergence:
        return Divergence(-total(plan), 0.0)  # sums show the worst first

    search = PlanSearch(LAYERS, SENSITIVITIES, measure, MANY_S, SilentProgress())
    first = least_sensitive_plans(LAYERS, SENSITIVITIES)[5]
    found = search.refine(5, good_enough=lambda plan: search.kl(plan) < search.kl(first))
    assert search.kl(found) < search.kl(first)
    assert sum(search.kl(plan) < search.kl(first) for plan in search.measured) == 1
    assert search.kl(search.refine(5)) < search.kl(found)


def test_time_bounds_the_search() -> None:
    measured: list[Plan] = []

    def measure(plan: Plan) -> Divergence:
        measured.append(plan)
        return Divergence(total(plan), 0.0)

    search = PlanSearch(LAYERS, SENSITIVITIES, measure, 0.0, SilentProgress())
    assert search.refine(5) == least_sensitive_plans(LAYERS, SENSITIVITIES)[5]
    assert len(measured) == 1


@pytest.fixture(scope="module")
def baseline(tiny_model: TinyModelFactory) -> Baseline:
    """A random model whose layers 2 and 3 add almost nothing: the pair to choose."""
    model = load_model(tiny_model().path, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for layer in (2, 3):
            for projection in ("self_attn.o_proj", "mlp.down_proj"):
                model.get_submodule(f"model.layers.{layer}.{projection}").weight *= 0.01
    tokens = torch.tensor([random_tokens(24, seed) for seed in range(4)])
    return Baseline(model, Windows(tokens, "random"), SilentProgress())


@pytest.fixture(scope="module")
def comparison(baseline: Baseline, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return Comparison(baseline, None, tmp_path_factory.mktemp("compared"))


@pytest.fixture(scope="module")
def sensitivities(comparison: Comparison) -> dict[Group, float]:
    return measure_sensitivities(comparison, list(candidates(6, 3)), SilentProgress())


SHAPE = ModelShape(8, 2, 2, 4, 16, 300)
COSTS = Costs(SHAPE, layer_us=100, head_us=50, link_us=10)


@pytest.fixture
def finder(comparison: Comparison, sensitivities: dict[Group, float]) -> PlanFinder:
    return PlanFinder(comparison, sensitivities, COSTS, 2, MANY_S, SilentProgress())


def test_a_planted_pair_is_found(finder: PlanFinder) -> None:
    found = finder.find(Goal(depth=5))
    assert [g.layers for g in found.plan.groups if g.size > 1] == [(2, 3)]
    assert found.divergence.kl < 0.01


def test_the_shallowest_plan_within_a_bound_is_found(finder: PlanFinder) -> None:
    """Layers that add nothing may run beside any neighbour; no plan of fewer groups will do."""
    found = finder.find(Goal(max_kl=0.01))
    assert found.depth == 4
    assert found.divergence.kl < 0.01
    assert all(each.divergence.kl > 0.01 for each in finder.pareto_front() if each.depth < 4)


def test_a_loss_bounds_perplexity(finder: PlanFinder, baseline: Baseline) -> None:
    found = finder.find(Goal(max_loss=0.002))
    assert found.depth < 6
    assert found.divergence.perplexity <= 1.002 * baseline.perplexity


def test_a_latency_bounds_the_depth(finder: PlanFinder) -> None:
    """Five groups of 100 us and half a head take 525 us without exchanges; six take more."""
    found = finder.find(Goal(max_latency_us=590))
    assert found.depth == 5
    assert 525 < found.latency_us <= 590
    with pytest.raises(PlanError, match="no plan takes 100 us a token or less; the fastest takes"):
        finder.find(Goal(max_latency_us=100))


def test_a_plan_that_exchanges_less_is_found_where_the_best_is_too_slow(
    comparison: Comparison, sensitivities: dict[Group, float]
) -> None:
    """The bypass of least divergence may take an exchange too many."""
    costs = Costs(SHAPE, layer_us=100, head_us=50, link_us=30)

    def latency_us(plan: Plan) -> float:
        return assign(plan, 2, SHAPE).latency_us(costs)

    finder = PlanFinder(comparison, sensitivities, costs, 2, MANY_S, SilentProgress())
    pairs = [Plan.covering([group], 6) for group in sensitivities if group.size == 2]
    bound = min(map(latency_us, pairs))
    assert bound < latency_us(next(p for p in pairs if str(p.groups[0].bypass) == "1"))
    found = finder.find(Goal(max_latency_us=bound))
    assert found.depth == 5
    assert found.latency_us <= bound
    allowed = [plan for plan in pairs if latency_us(plan) <= bound]
    assert found.divergence.kl == pytest.approx(min(comparison.compare(p).kl for p in allowed))


def test_layers_are_timed_as_a_rank_computes_them(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The precision that plans are measured in plays no part, and is left as it was."""
    during: list[tuple[int, str]] = []

    def prepare(*arguments: Any) -> Any:
        measure = prepare_layers(*arguments)

        def noted(*arguments: Any) -> Any:
            during.append((torch.get_num_threads(), torch.get_float32_matmul_precision()))
            return measure(*arguments)

        return noted

    monkeypatch.setattr(latency, "prepare_layers", prepare)
    torch.set_float32_matmul_precision("medium")
    try:
        cost = latency.measure_costs(tiny.path, 50)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(during) == {(1, "highest")}
    assert cost.layer_us > 0


def test_goals_that_cannot_be_kept_are_said(
    comparison: Comparison, sensitivities: dict[Group, float]
) -> None:
    costly = {group: kl for group, kl in sensitivities.items() if group.layers == (4, 5)}
    finder = PlanFinder(comparison, costly, COSTS, 2, MANY_S, SilentProgress())
    with pytest.raises(PlanError, match="no two layers can run concurrently within this bound"):
        finder.find(Goal(max_kl=1e-3))
    for depth in (2, 7):
        with pytest.raises(PlanError, match=rf"depth is {depth}, but .* reach depths 3 to 6"):
            finder.find(Goal(depth))
    for goal in ({}, {"depth": 5, "max_kl": 1.0}):
        with pytest.raises(PlanError, match="give one goal"):
            Goal(**goal)  # type: ignore[arg-type]


def test_searched_plans_are_no_worse_than_regular_ones(
    finder: PlanFinder, baseline: Baseline
) -> None:
    finder.find(Goal(depth=4))
    best = {each.depth: each.divergence.kl for each in finder.pareto_front()}
    published = list(finder.published_methods(input_similarity(baseline)))
    kinds = {each.to_json()["kind"] for each in published}
    assert kinds == {"CQIL D0", "CQIL D1", "layers removed"}
    for each in published:
        if each.depth == 4 and isinstance(each, MeasuredPlan):
            assert best[4] <= each.divergence.kl
