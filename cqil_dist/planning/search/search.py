"""Search for the best plan of each depth: dynamic programming, then local search by measurement.

Knows groups, their sensitivities, and a function that measures whole plans; nothing of models or
tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, product

from cqil_dist.plan import Group, Plan
from cqil_dist.planning.measure.baseline import Divergence
from cqil_dist.planning.search.sensitivity import Sensitivities, groups_by_layers
from cqil_dist.progress import Progress

# A step of local search splits one group and joins two others: it tries this many splits, and
# measures this many of the plans that each leads to.
_SPLITS = 4
_JOINS = 8


def least_sensitive_plans(num_layers: int, sensitivities: Sensitivities) -> dict[int, Plan]:
    """Find the plans, by depth, whose groups have the smallest sum of sensitivities.

    The sum is not the plan's divergence, but ranks plans well enough to start from.
    """
    ending: dict[int, list[Group]] = {last: [Group((last,))] for last in range(num_layers)}
    for least, *_ in groups_by_layers(sensitivities).values():
        ending[least.layers[-1]].append(least)
    # best[n][d]: the smallest sum for the first n layers in d groups, and those groups.
    best: list[dict[int, tuple[float, tuple[Group, ...]]]] = [{0: (0.0, ())}]
    for last in range(num_layers):
        by_depth: dict[int, tuple[float, tuple[Group, ...]]] = {}
        for group in ending[last]:
            for depth, (cost, groups) in best[group.layers[0]].items():
                total = cost + sensitivities.get(group, 0.0)
                if depth + 1 not in by_depth or total < by_depth[depth + 1][0]:
                    by_depth[depth + 1] = (total, (*groups, group))
        best.append(by_depth)
    return {depth: Plan(groups, num_layers) for depth, (_, groups) in sorted(best[-1].items())}


@dataclass
class PlanSearch:
    """A search among the plans that can be made of groups with known sensitivities.

    Attributes:
        measure: compares a whole plan with the original model.
        seconds: how long to search from now on; a measurement that has begun is finished.
        measured: the divergence of each plan that has been measured so far.
        reachable: for each depth, the plan with the smallest sum of sensitivities.
    """

    num_layers: int
    sensitivities: Sensitivities
    measure: Callable[[Plan], Divergence]
    seconds: float
    progress: Progress
    measured: dict[Plan, Divergence] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._ends = time.monotonic() + self.seconds
        self.reachable = least_sensitive_plans(self.num_layers, self.sensitivities)
        self._known = groups_by_layers(self.sensitivities)

    def kl(self, plan: Plan) -> float:
        """Return a whole plan's KL divergence, in nats a token, which is measured only once."""
        if plan not in self.measured:
            self.measured[plan] = self.measure(plan)
        return self.measured[plan].kl

    def best_by_depth(self) -> dict[int, Plan]:
        """Return the best plan of each depth among those measured so far, in order of depth."""
        best: dict[int, Plan] = {}
        for plan in self.measured:
            if plan.depth not in best or self.kl(plan) < self.kl(best[plan.depth]):
                best[plan.depth] = plan
        return dict(sorted(best.items()))

    def refine(
        self,
        depth: int,
        start: Plan | None = None,
        allowed: Callable[[Plan], bool] = lambda plan: True,
        good_enough: Callable[[Plan], bool] = lambda plan: False,
    ) -> Plan:
        """Find the best plan of a reachable depth by local search, in the time that is left.

        Each step splits one group and joins two others, or changes one group's bypass. The search
        ends when no such change improves the plan.

        Args:
            start: the plan to start from; None starts from the best known one of this depth.
            allowed: whether a plan may be chosen, before it is measured; true of `start`.
            good_enough: whether a measured plan ends the search.
        """
        best = start or self.best_by_depth().get(depth, self.reachable[depth])
        with self.progress.task(f"Refining depth {depth}", unit="plans") as task:
            counted = len(self.measured)
            self.kl(best)
            improved = True
            while improved and time.monotonic() < self._ends:
                improved = False
                for plan in self._neighbours(best, allowed):
                    if self.kl(plan) < self.kl(best):
                        best, improved = plan, True
                    task.update(len(self.measured) - counted)
                    if good_enough(plan):
                        return best
        return best

    def _neighbours(self, plan: Plan, allowed: Callable[[Plan], bool]) -> Iterator[Plan]:
        """Yield plans of the same depth to measure, most promising first, until time is up."""
        splits = sorted(self._splits(plan), key=lambda ways: self._sum(ways[0]))
        for ways in splits[:_SPLITS]:
            joined = (
                [each for each in self._joins(deeper, allowed) if each != plan] for deeper in ways
            )
            found = sorted(next(filter(None, joined), []), key=self._sum)
            yield from self._in_time(found[:_JOINS])
        yield from self._in_time(filter(allowed, self._other_bypasses(plan)))

    def _in_time(self, plans: Iterable[Plan]) -> Iterator[Plan]:
        for plan in plans:
            if time.monotonic() > self._ends:
                return
            yield plan

    def _splits(self, plan: Plan) -> Iterator[list[Plan]]:
        """Yield the plans with a group split in two: for every cut, with each pair of bypasses.

        The least sensitive pair comes first.
        """
        for index, group in enumerate(plan.groups):
            for cut in range(1, group.size):
                parts = (self._groups(group.layers[:cut]), self._groups(group.layers[cut:]))
                plans = [self._replaced(plan, index, 1, each) for each in product(*parts)]
                yield sorted(plans, key=self._sum)

    def _joins(self, plan: Plan, allowed: Callable[[Plan], bool]) -> Iterator[Plan]:
        """Yield every plan that joins two adjacent groups, with the best bypass allowed."""
        for index, (group, following) in enumerate(pairwise(plan.groups)):
            joined = self._groups(group.layers + following.layers)
            plans = (self._replaced(plan, index, 2, [each]) for each in joined)
            yield from islice(filter(allowed, plans), 1)

    def _other_bypasses(self, plan: Plan) -> Iterator[Plan]:
        """Yield every plan that differs in one group's bypass alone."""
        for index, group in enumerate(plan.groups):
            for other in self._known.get(group.layers, []):
                if other != group:
                    yield self._replaced(plan, index, 1, [other])

    def _groups(self, layers: tuple[int, ...]) -> list[Group]:
        """Return the known groups of these layers, one for every bypass, least sensitive first."""
        return [Group(layers)] if len(layers) == 1 else self._known.get(layers, [])

    def _replaced(self, plan: Plan, first: int, count: int, groups: Sequence[Group]) -> Plan:
        """Return the plan with `groups` in place of `count` of its groups."""
        return Plan((*plan.groups[:first], *groups, *plan.groups[first + count :]), plan.num_layers)

    def _sum(self, plan: Plan) -> float:
        """Return the sum of the groups' sensitivities."""
        return sum(self.sensitivities.get(group, 0.0) for group in plan.groups)
