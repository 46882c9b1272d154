"""The best irregular plan of each depth: dynamic programming, then local search by measurement.

Knows groups, what each costs by itself, and something that measures whole plans; nothing of models
or tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, product

from cqil_dist.plan import Group, Plan
from cqil_dist.planning.measure.divergence import Divergence
from cqil_dist.planning.search.sensitivity import Sensitivities, groups_by_layers
from cqil_dist.progress import Progress

# Of the plans one group deeper, from how many to go on; and from each, how many plans to measure.
_LOOSENED = 4
_TIGHTENED = 8


def additive_front(num_layers: int, sensitivities: Sensitivities) -> dict[int, Plan]:
    """The plan of each depth whose groups' sensitivities have the least sum.

    That sum is not the plan's divergence, but orders plans well enough to begin with.
    """
    ending: dict[int, list[Group]] = {last: [Group((last,))] for last in range(num_layers)}
    for best, *_ in groups_by_layers(sensitivities).values():
        ending[best.layers[-1]].append(best)
    # fronts[n][d]: least sum, and groups, of the first n layers in d groups.
    fronts: list[dict[int, tuple[float, tuple[Group, ...]]]] = [{0: (0.0, ())}]
    for last in range(num_layers):
        front: dict[int, tuple[float, tuple[Group, ...]]] = {}
        for group in ending[last]:
            for depth, (cost, groups) in fronts[group.layers[0]].items():
                total = cost + sensitivities.get(group, 0.0)
                if depth + 1 not in front or total < front[depth + 1][0]:
                    front[depth + 1] = (total, (*groups, group))
        fronts.append(front)
    return {depth: Plan(groups, num_layers) for depth, (_, groups) in sorted(fronts[-1].items())}


@dataclass
class PlanSearch:
    """Searches among plans of the groups whose sensitivity is known.

    Attributes:
        measure: compares a whole plan with the original.
        measured: all that has been measured so far.
        reachable: the additively best plan of each depth.
        seconds: how long to search from now on; what is begun is finished.
    """

    num_layers: int
    sensitivities: Sensitivities
    measure: Callable[[Plan], Divergence]
    seconds: float
    progress: Progress
    measured: dict[Plan, Divergence] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._ends = time.monotonic() + self.seconds
        self.reachable = additive_front(self.num_layers, self.sensitivities)
        self._known = groups_by_layers(self.sensitivities)

    def kl(self, plan: Plan) -> float:
        """The divergence of a whole plan, measured once."""
        if plan not in self.measured:
            self.measured[plan] = self.measure(plan)
        return self.measured[plan].kl

    def front(self) -> dict[int, Plan]:
        """The best plan of every depth measured so far."""
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
        enough: Callable[[Plan], bool] = lambda plan: False,
    ) -> Plan:
        """The best plan of a reachable depth that local search finds in the time that is left.

        A round takes a group apart and joins two others, in the way that measures best, or changes
        one group's bypass. Ends where no such change helps.

        Args:
            start: where to begin; the best known plan of this depth if None.
            allowed: which plans may be taken, `start` among them; decided before measuring.
            enough: of a measured plan, whether to look no further.
        """
        best = start or self.front().get(depth, self.reachable[depth])
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
                    if enough(plan):
                        return best
        return best

    def _neighbours(self, plan: Plan, allowed: Callable[[Plan], bool]) -> Iterator[Plan]:
        """Plans of the same depth that may be better, most promising first; until time is up."""
        splits = sorted(self._loosened(plan), key=lambda ways: self._sum(ways[0]))
        for ways in splits[:_LOOSENED]:
            tightened = (
                [each for each in self._tightened(deeper, allowed) if each != plan]
                for deeper in ways
            )
            found = sorted(next(filter(None, tightened), []), key=self._sum)
            yield from self._in_time(found[:_TIGHTENED])
        yield from self._in_time(filter(allowed, self._other_bypasses(plan)))

    def _in_time(self, plans: Iterable[Plan]) -> Iterator[Plan]:
        for plan in plans:
            if time.monotonic() > self._ends:
                return
            yield plan

    def _loosened(self, plan: Plan) -> Iterator[list[Plan]]:
        """Every way to make one group two: with the best bypass of each first, then with others."""
        for index, group in enumerate(plan.groups):
            for cut in range(1, group.size):
                parts = (self._groups(group.layers[:cut]), self._groups(group.layers[cut:]))
                plans = [self._replaced(plan, index, 1, each) for each in product(*parts)]
                yield sorted(plans, key=self._sum)

    def _tightened(self, plan: Plan, allowed: Callable[[Plan], bool]) -> Iterator[Plan]:
        """Every plan in which two adjacent groups are one, with the best bypass allowed there."""
        for index, (group, following) in enumerate(pairwise(plan.groups)):
            joined = self._groups(group.layers + following.layers)
            plans = (self._replaced(plan, index, 2, [each]) for each in joined)
            yield from islice(filter(allowed, plans), 1)

    def _other_bypasses(self, plan: Plan) -> Iterator[Plan]:
        for index, group in enumerate(plan.groups):
            for other in self._known.get(group.layers, []):
                if other != group:
                    yield self._replaced(plan, index, 1, [other])

    def _groups(self, layers: tuple[int, ...]) -> list[Group]:
        """With each known bypass, the least sensitive first."""
        return [Group(layers)] if len(layers) == 1 else self._known.get(layers, [])

    def _replaced(self, plan: Plan, first: int, count: int, groups: Sequence[Group]) -> Plan:
        return Plan((*plan.groups[:first], *groups, *plan.groups[first + count :]), plan.num_layers)

    def _sum(self, plan: Plan) -> float:
        return sum(self.sensitivities.get(group, 0.0) for group in plan.groups)
