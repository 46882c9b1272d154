"""The Pareto front of depth and quality, by search; beside it, the methods of the literature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cqil_dist.assignment import Assignment, assign
from cqil_dist.costs import Costs
from cqil_dist.errors import PlanError
from cqil_dist.plan import Bypass, Group, Plan
from cqil_dist.planning.measure.baseline import Divergence
from cqil_dist.planning.measure.similarity import regular_plan, without_layers
from cqil_dist.planning.provenance import made_with
from cqil_dist.planning.search.comparison import Comparison
from cqil_dist.planning.search.goal import Goal
from cqil_dist.planning.search.search import PlanSearch, least_sensitive_plans
from cqil_dist.planning.search.sensitivity import Sensitivities
from cqil_dist.progress import Progress
from cqil_dist.records import headed


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan, and what was measured of it on the calibration text.

    Attributes:
        kind: how it was chosen: "search", or by similarity of inputs, "CQIL D0" or "CQIL D1".
        latency_us: microseconds a token by the cost model.
        exchanges: exchanges a token takes part in.
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
        """Return a plan file's content: the plan as `Plan.parse` reads it, and its measurements."""
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
    """The model without some of its layers, and its divergence on the calibration text.

    Attributes:
        depth: the number of layers that are left.
    """

    depth: int
    divergence: Divergence

    def to_json(self) -> dict[str, Any]:
        return _point("layers removed", self.depth, self.divergence)


def _point(kind: str, depth: int, divergence: Divergence) -> dict[str, Any]:
    return {"kind": kind, "depth": depth, "kl": divergence.kl, "perplexity": divergence.perplexity}


class PlanFinder:
    """Finds the best plan for a goal, and the plans to compare it with.

    Args:
        comparison: measures whole plans, in the way that the groups' sensitivities were measured.
        costs, ranks: what a plan's latency is predicted from.
        seconds: how long to search by measuring whole plans.
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
        self._uncompensated = comparison.uncompensated
        self._sensitivities = sensitivities
        self._costs = costs
        self._ranks = ranks
        self._progress = progress
        self._search = PlanSearch(
            self._baseline.num_layers, sensitivities, comparison.compare, seconds, progress
        )

    def find(self, goal: Goal) -> MeasuredPlan:
        """Find the best plan that meets a goal.

        Raises:
            PlanError: no plan of the measured groups meets it.
        """
        largest = max((group.size for group in self._sensitivities), default=1)
        goal.check(self._baseline.num_layers, largest)
        if goal.depth is not None:
            return self._measured(self._search.refine(goal.depth))
        if (max_us := goal.max_latency_us) is not None:
            start = self._deepest_within(max_us)
            found = self._search.refine(
                start.depth, start, lambda plan: self._latency_us(plan) <= max_us
            )
            return self._measured(found)
        depth = self._shallowest(goal)
        self._search.refine(depth)
        within = self._within(goal, depth)  # refining regards the divergence alone
        return self._measured(min(within, key=self._search.kl))

    def pareto_front(self) -> list[MeasuredPlan]:
        """Find the best plan of each depth that is at least half the number of layers."""
        half = self._baseline.num_layers // 2
        wanted = [plan for depth, plan in self._search.reachable.items() if depth >= half]
        with self._progress.task("Measuring the Pareto front", len(wanted), "plans") as task:
            for plan in wanted:
                self._search.kl(plan)
                task.advance()
        return [self._measured(p) for p in self._search.best_by_depth().values() if p.depth >= half]

    def published_methods(self, similarity_LL: Tensor) -> Iterator[MeasuredPlan | LayersRemoved]:
        """Measure CQIL's regular plans and ShortGPT's removed layers, at the same depths."""
        layers = self._baseline.num_layers
        depths = range(layers - 1, layers // 2 - 1, -1)
        with self._progress.task("Measuring published methods", len(depths), "depths") as task:
            for depth in depths:
                for bypass in ("0", "1"):
                    plan = regular_plan(similarity_LL, 2, depth, Bypass.parse(bypass))
                    if plan is not None:
                        divergence = self._uncompensated.compare(plan)
                        yield self._of_plan(f"CQIL D{bypass}", plan, divergence)
                kept = without_layers(similarity_LL, depth)
                yield LayersRemoved(depth, self._uncompensated.compare_layers(kept))
                task.advance()

    def _shallowest(self, goal: Goal) -> int:
        """Find the smallest depth where a plan meets the goal, going down from the original model.

        Where the first plan of a depth does not meet it, local search goes on only until one does:
        the time that is left is for the depth that is found.
        """
        best: int | None = None
        for depth in sorted(self._search.reachable, reverse=True)[1:]:
            self._search.kl(self._search.reachable[depth])
            if not self._within(goal, depth):
                self._search.refine(depth, good_enough=lambda plan: self._meets(plan, goal))
            if not self._within(goal, depth):
                break
            best = depth
        if best is None:
            raise PlanError(
                "no two layers can run concurrently within this bound; allow a larger loss, or "
                "measure larger groups (--max-group)"
            )
        return best

    def _within(self, goal: Goal, depth: int) -> list[Plan]:
        """Return the measured plans of this depth that meet the goal."""
        measured = [plan for plan in self._search.measured if plan.depth == depth]
        return [plan for plan in measured if self._meets(plan, goal)]

    def _meets(self, plan: Plan, goal: Goal) -> bool:
        """Return whether a measured plan is within the goal's bound on divergence or perplexity."""
        divergence = self._search.measured[plan]
        if goal.max_loss is not None:
            return divergence.perplexity <= (1 + goal.max_loss) * self._baseline.perplexity
        return goal.max_kl is None or divergence.kl <= goal.max_kl

    def _deepest_within(self, max_latency_us: float) -> Plan:
        """Find the deepest plan that is fast enough, of the least sensitive plans of each depth.

        Among these are plans of only such groups as exchange once and have a rank for each layer.
        """
        quick = {
            group: kl
            for group, kl in self._sensitivities.items()
            if _exchanges_once(group) and group.size <= self._ranks
        }
        quick_plans = least_sensitive_plans(self._baseline.num_layers, quick)
        plans = [*self._search.reachable.values(), *quick_plans.values()]
        within = [plan for plan in plans if self._latency_us(plan) <= max_latency_us]
        if not within:
            fastest = min(map(self._latency_us, plans))
            raise PlanError(
                f"no plan takes {max_latency_us:.0f} us a token or less; the fastest takes "
                f"{fastest:.0f} us on {self._ranks} ranks: allow as much, or give more ranks"
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
    """Return the record of a search, which `plot_pareto_front` and the report read."""
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


def _exchanges_once(group: Group) -> bool:
    """Return whether no member sees another's attention, so that ranks exchange outputs alone."""
    return all(set(group.visible(member)) <= {member} for member in range(group.size))
