"""What a token's way through a plan takes: a cost model of computing and exchanging."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from cqil_dist.assignment import Assignment, assign
from cqil_dist.benchmarks.workers import prepare_layers
from cqil_dist.model.config import ModelConfig
from cqil_dist.plan import Plan

_CONTEXT = 128
_WARM_UP = 3
_REPEATS = 15


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


def measure_cost(path: Path, ranks: int, link_us: float) -> CostModel:
    """Time a model's layers and head as a rank computes them: float32, one thread of this CPU.

    Whatever precision plans are measured in: for one token, products in bfloat16 take twice as long
    as those in float32, since weights are converted each time.
    """
    config = ModelConfig.from_directory(path)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        position = min(_CONTEXT, config.max_positions - 1)
        measure = prepare_layers(path, 1, position + 1)
        measure(position, _WARM_UP)
        times_ms = measure(position, _REPEATS)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    layer_us, head_us = (1000 * median(times_ms[part::2]) for part in (0, 1))
    return CostModel(layer_us, head_us, link_us, ranks, config.vocab_size)
