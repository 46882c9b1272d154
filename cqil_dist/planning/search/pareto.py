"""Depth against quality: searched plans, and beside them the paper's and removed layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cqil_dist.assignment import Assignment, assign
from cqil_dist.costs import Costs
from cqil_dist.errors import PlanError
from cqil_dist.plan import Bypass, Group, Plan
from cqil_dist.planning.measure.divergence import Divergence
from cqil_dist.planning.measure.similarity import regular_plan, without_layers
from cqil_dist.planning.provenance import made_with
from cqil_dist.planning.search.comparison import Comparison
from cqil_dist.planning.search.goal import Goal
from cqil_dist.planning.search.search import PlanSearch, additive_front
from cqil_dist.planning.search.sensitivity import Sensitivities
from cqil_dist.progress import Progress
from cqil_dist.records import headed


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan that was measured on the calibration text.

    Attributes:
        kind: "search", "CQIL D0" or "CQIL D1".
    """

    kind: str
    plan: Plan
    divergence: Divergence
    latency_us: float
    exchanges: int

    @property
    def depth(self) -> int:
        return self.plan.depth

    def to_json(self) -> dict[str, Any]:
        return {
            **_point(self.kind, self.depth, self.divergence),
            "latency_us": self.latency_us,
            "exchanges": self.exchanges,
            "plan": self.plan.to_json(),
        }

    def plan_json(self, comparison: Comparison) -> dict[str, Any]:
        """The plan, as `Plan.parse` reads it, and what was measured of it."""
        described = comparison.to_json()
        measured = {
            **made_with(comparison.baseline.windows),
            "original_perplexity": described["perplexity"],
            "compensation": described["compensation"],
            "kl": self.divergence.kl,
            "perplexity": self.divergence.perplexity,
        }
        return {**self.plan.to_json(), "measured": measured}

    def describe(self, comparison: Comparison) -> str:
        ratio = self.divergence.perplexity / comparison.baseline.perplexity
        compensated = ", once compensated (cqil plan compensate)" if comparison.compensation else ""
        return (
            f"{self.depth} groups, KL {self.divergence.kl:.3f} nats a token, perplexity "
            f"{ratio:.3f}x on the calibration text{compensated}"
        )


@dataclass(frozen=True)
class LayersRemoved:
    """The model without some of its layers, measured on the calibration text.

    Attributes:
        depth: layers that are left.
    """

    depth: int
    divergence: Divergence

    def to_json(self) -> dict[str, Any]:
        return _point("layers removed", self.depth, self.divergence)


def _point(kind: str, depth: int, divergence: Divergence) -> dict[str, Any]:
    return {"kind": kind, "depth": depth, "kl": divergence.kl, "perplexity": divergence.perplexity}


class PlanFinder:
    """Finds the best plan for a goal, and measures what it is to be compared with.

    Args:
        comparison: how plans are measured, and were their groups.
        costs, ranks: what their latency is predicted from.
    """

    def __init__(
        self,
        comparison: Comparison,
        sensitivities: Sensitivities,
        costs: Costs,
        ranks: int,
        seconds: float,
        progress: Progress,
    ) -> None:
        self._baseline = comparison.baseline
        self._plain = comparison.uncompensated
        self._sensitivities = sensitivities
        self._costs = costs
        self._ranks = ranks
        self._progress = progress
        self._search = PlanSearch(
            self._baseline.num_layers, sensitivities, comparison.compare, seconds, progress
        )

    def find(self, goal: Goal) -> MeasuredPlan:
        """The best plan for a goal.

        Raises:
            PlanError: no plan of the known groups keeps to it.
        """
        largest = max((group.size for group in self._sensitivities), default=1)
        goal.check(self._baseline.num_layers, largest)
        if goal.depth is not None:
            return self._measured(self._search.refine(goal.depth))
        if goal.max_latency_us is not None:
            start = self._deepest_within(goal.max_latency_us)
            return self._measured(
                self._search.refine(start.depth, start, lambda plan: self._keeps_to(plan, goal))
            )
        depth = self._shallowest(goal)
        self._search.refine(depth)
        within = self._within(goal, depth)  # refining looks at divergence alone
        return self._measured(min(within, key=self._search.kl))

    def front(self) -> list[MeasuredPlan]:
        """The best plan of every depth from half the layers on."""
        half = self._baseline.num_layers // 2
        wanted = [plan for depth, plan in self._search.reachable.items() if depth >= half]
        with self._progress.task("Measuring the front", len(wanted), "plans") as task:
            for plan in wanted:
                self._search.kl(plan)
                task.advance()
        return [self._measured(p) for p in self._search.front().values() if p.depth >= half]

    def baselines(self, similarity_LL: Tensor) -> Iterator[MeasuredPlan | LayersRemoved]:
        """Regular plans by similarity of inputs, and removed layers, at the same depths."""
        layers = self._baseline.num_layers
        with self._progress.task("Measuring baselines", layers - layers // 2, "depths") as task:
            for depth in range(layers - 1, layers // 2 - 1, -1):
                for bypass in ("0", "1"):
                    plan = regular_plan(similarity_LL, 2, depth, Bypass.parse(bypass))
                    if plan is not None:
                        divergence = self._plain.compare(plan)
                        yield self._of_plan(f"CQIL D{bypass}", plan, divergence)
                divergence = self._plain.compare_layers(without_layers(similarity_LL, depth))
                yield LayersRemoved(depth, divergence)
                task.advance()

    def _shallowest(self, goal: Goal) -> int:
        """Down from the original, as far as the goal allows; refined where a plan falls short.

        Only until one is good enough: time that is left goes to the depth that is found.
        """
        best: int | None = None
        for depth in sorted(self._search.reachable, reverse=True)[1:]:
            self._search.kl(self._search.reachable[depth])
            if not self._within(goal, depth):
                self._search.refine(depth, enough=lambda plan: self._keeps_to(plan, goal))
            if not self._within(goal, depth):
                break
            best = depth
        if best is None:
            raise PlanError(
                "no two layers can run together within this bound; allow more, or measure larger "
                "groups (--max-group)"
            )
        return best

    def _within(self, goal: Goal, depth: int) -> list[Plan]:
        """What has been measured of this depth and keeps to the goal."""
        measured = [plan for plan in self._search.measured if plan.depth == depth]
        return [plan for plan in measured if self._keeps_to(plan, goal)]

    def _keeps_to(self, plan: Plan, goal: Goal) -> bool:
        if goal.max_latency_us is not None:
            return self._latency_us(plan) <= goal.max_latency_us
        divergence = self._search.measured[plan]
        if goal.max_kl is not None:
            return divergence.kl <= goal.max_kl
        assert goal.max_loss is not None, "one of a goal's bounds is given"
        return divergence.perplexity <= (1 + goal.max_loss) * self._baseline.perplexity

    def _deepest_within(self, max_latency_us: float) -> Plan:
        """Of plans that lose least, and of those that also exchange least or share work evenly."""
        quick = {
            group: kl
            for group, kl in self._sensitivities.items()
            if _meets_once(group) and group.size <= self._ranks
        }
        fronts = [self._search.reachable, additive_front(self._baseline.num_layers, quick)]
        plans = [plan for front in fronts for plan in front.values()]
        within = [plan for plan in plans if self._latency_us(plan) <= max_latency_us]
        if not within:
            fastest = min(map(self._latency_us, plans))
            raise PlanError(
                f"no plan takes {max_latency_us:.0f} us a token or less; the fastest takes "
                f"{fastest:.0f} us on {self._ranks} ranks"
            )
        return max(within, key=lambda plan: plan.depth)

    def _measured(self, plan: Plan) -> MeasuredPlan:
        return self._of_plan("search", plan, self._search.measured[plan])

    def _of_plan(self, kind: str, plan: Plan, divergence: Divergence) -> MeasuredPlan:
        exchanges = self._assigned(plan).rounds
        return MeasuredPlan(kind, plan, divergence, self._latency_us(plan), exchanges)

    def _latency_us(self, plan: Plan) -> float:
        return self._assigned(plan).latency_us(self._costs)

    def _assigned(self, plan: Plan) -> Assignment:
        return assign(plan, self._ranks, self._costs.shape)


def front_json(
    model: str,
    comparison: Comparison,
    costs: Costs,
    ranks: int,
    measured: Sequence[MeasuredPlan | LayersRemoved],
) -> dict[str, Any]:
    """What depth costs a model, as `plot_front` and the report read it."""
    return headed(
        "front",
        model=model,
        **comparison.to_json(),
        cost={
            "layer_us": costs.layer_us,
            "head_us": costs.head_us,
            "link_us": costs.link_us,
            "ranks": ranks,
            "vocab_size": costs.shape.vocab_size,
        },
        measured=[each.to_json() for each in measured],
    )


def _meets_once(group: Group) -> bool:
    """Whether no member sees another's attention: their outputs meet, and nothing before."""
    return all(set(group.visible(member)) <= {member} for member in range(group.size))
