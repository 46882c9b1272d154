"""Measuring the costs of a model's layers and head on this machine."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch

from cqil_dist.costs import Costs
from cqil_dist.model.config import ModelConfig
from cqil_dist.rank.layer_timing import prepare_layers

_CONTEXT = 128
_WARM_UP = 3
_REPEATS = 15


def measure_costs(path: Path, link_us: float) -> Costs:
    """Time a model's layers and head as a rank computes them, in float32 on one thread of this CPU.

    The precision that plans are measured in plays no part: for a single token, products in bfloat16
    take twice as long as those in float32, since weights are converted each time.
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
    return Costs(config.shape, layer_us, head_us, link_us)
