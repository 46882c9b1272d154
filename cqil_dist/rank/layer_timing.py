"""How long a layer and a head share take on this machine, without any exchange."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from cqil_dist.assignment import assign
from cqil_dist.exchange.tcp import TcpExchange
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.formats import FloatFormat
from cqil_dist.model.head import Embedding, HeadShard
from cqil_dist.model.precision import Precision
from cqil_dist.model.step import Segment
from cqil_dist.plan import Plan
from cqil_dist.rank.program import CacheShape, RankProgram

_LAYERS_BYTES = 1 << 30


def prepare_layers(path: Path, world: int, max_len: int) -> Callable[[int, int], list[float]]:
    """Load layers and one rank's share of the head, and return what times them in decode steps.

    Only as many layers are loaded as do not fit into a processor's caches; they stand for all.

    Args:
        world: ranks that share the vocabulary head.

    Returns:
        `measure(position, repetitions)`, which gives milliseconds: of one layer, of the head share,
        of one layer again and so on, once each for every repetition.
    """
    config = ModelConfig.from_directory(path)
    layer_bytes = 4 * sum(out * inner for out, inner in config.projection_shapes.values())
    config = replace(config, num_layers=min(config.num_layers, 1 + _LAYERS_BYTES // layer_bytes))
    checkpoint = Checkpoint(path)
    device, precision = torch.device("cpu"), Precision.of("float32")
    sequential = assign(Plan.sequential(config.num_layers), 1, config.shape)
    cache = CacheShape(slots=1, max_len=max_len)
    program = RankProgram(0, [sequential], config, [checkpoint], cache, precision, device)
    exchange = TcpExchange(0, {}, {}, config.hidden_size, torch.float32, device, max_bytes=0)
    rows = assign(sequential.plan, world, config.shape).head_rows[0]
    head = HeadShard.load(config, checkpoint, rows, FloatFormat(torch.float32), device)
    hidden_ND = Embedding(config, checkpoint, torch.float32)([1])

    @torch.inference_mode()
    def measure(position: int, repetitions: int) -> list[float]:
        values: list[float] = []
        for _ in range(repetitions):
            started = time.perf_counter()
            program.layers([Segment(0, position, 1, 1)], hidden_ND, exchange)
            walked = time.perf_counter()
            head(hidden_ND)
            ended = time.perf_counter()
            values += [1000 * (walked - started) / config.num_layers, 1000 * (ended - walked)]
        return values

    return measure
