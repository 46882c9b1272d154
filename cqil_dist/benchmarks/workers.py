"""Work measured in processes of its own, each bound to one core, driven from one place.

A worker is started once, warms up, and then measures whenever it is asked to, so that what is
compared can take turns on the same machine.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from cqil_dist.assignment import assign
from cqil_dist.exchange.tcp import TcpExchange
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.head import Embedding, HeadShard
from cqil_dist.model.step import Segment
from cqil_dist.plan import Plan
from cqil_dist.runtime.rank import CacheShape, RankProgram

Measurement = Callable[..., list[float]]

_LAYERS_BYTES = 1 << 30


class Worker:
    """A process that runs one measurement on request; use it in a `with` block.

    Args:
        prepare: called once in the process; returns what `measure` calls.
        cores: the process is bound to these.
    """

    def __init__(
        self, prepare: Callable[..., Measurement], cores: tuple[int, ...], *arguments: Any
    ) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, prepare, cores, arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()  # prepared

    def begin(self, *arguments: Any) -> None:
        """Start a measurement; several workers can run theirs at the same time."""
        self._pipe.send(arguments)

    def result(self) -> list[float]:
        """Milliseconds, one value per repetition, of the measurement begun last."""
        values: list[float] = self._pipe.recv()
        return values

    def measure(self, *arguments: Any) -> list[float]:
        self.begin(*arguments)
        return self.result()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()


def _serve(
    pipe: Connection,
    prepare: Callable[..., Measurement],
    cores: tuple[int, ...],
    arguments: tuple[Any, ...],
) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    measure = prepare(*arguments)
    pipe.send("ready")
    try:
        while True:
            pipe.send(measure(*pipe.recv()))
    except EOFError:
        return


def prepare_transformers(path: Path, device: str, dtype: str) -> Measurement:
    """transformers' `generate`: [time to first token, then every inter-token latency], ms."""
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    model.to(device).eval()

    class Clock(BaseStreamer):  # type: ignore[misc]
        """Notes when each token is ready; the first call brings the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            """The times are read by the caller."""

    def measure(prompt_ids: list[int], max_tokens: int) -> list[float]:
        clock = Clock()
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                torch.tensor([prompt_ids], device=device),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                streamer=clock,
            )
        times = [started, *clock.times[1:]]
        return [1000 * (after - before) for before, after in pairwise(times)]

    return measure


def prepare_layers(path: Path, world: int, max_len: int) -> Measurement:
    """Where a decode step's time goes without any exchange: layers, and a rank's head share.

    Of as many layers as do not fit into a processor's caches; large ones stand for all alike.

    `measure(position, repetitions)` gives [milliseconds of one layer, of the head shard, ...]:
    medians are taken by the caller.
    """
    config = ModelConfig.from_directory(path)
    layer_bytes = 4 * sum(out * inner for out, inner in config.projection_shapes.values())
    config = replace(config, num_layers=min(config.num_layers, 1 + _LAYERS_BYTES // layer_bytes))
    checkpoint = Checkpoint(path)
    device = torch.device("cpu")
    sequential = assign(Plan.sequential(config.num_layers), 1, config.vocab_size)
    cache = CacheShape(slots=1, max_len=max_len)
    program = RankProgram(0, [sequential], config, [checkpoint], cache, torch.float32, device)
    exchange = TcpExchange(0, {}, {}, torch.float32, device, max_bytes=0)
    rows = assign(sequential.plan, world, config.vocab_size).head_rows[0]
    head = HeadShard.load(config, checkpoint, rows, torch.float32, device)
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
