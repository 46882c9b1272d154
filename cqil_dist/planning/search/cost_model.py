"""What a token's way through a plan takes: computing and exchanging."""

from __future__ import annotations

from dataclasses import dataclass

from cqil_dist.assignment import Assignment, assign
from cqil_dist.plan import Plan


@dataclass(frozen=True)
class CostModel:
    """What a token costs on each of some ranks.

    Attributes:
        layer_us: one layer on one rank.
        head_us: the whole vocabulary on one rank.
        link_us: an exchange between ranks, from when the last of them is ready.
        ranks: how many there are.
    """

    layer_us: float
    head_us: float
    link_us: float
    ranks: int
    vocab_size: int

    def latency_us(self, plan: Plan) -> float:
        """Of one token: each group takes as long as the rank that computes most of it."""
        assignment = self._assignment(plan)
        computed = sum(max(map(len, stage.pieces)) for stage in assignment.stages)
        exchanged = assignment.rounds * self.link_us
        return computed * self.layer_us + exchanged + self.head_us / self.ranks

    def exchanges(self, plan: Plan) -> int:
        """That a token takes part in."""
        return self._assignment(plan).rounds

    def _assignment(self, plan: Plan) -> Assignment:
        return assign(plan, self.ranks, self.vocab_size)
