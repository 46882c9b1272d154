"""Measurements in processes of their own, each bound to its cores.

A worker is started once and then measures on request, so that the configurations that are compared
can take turns on the same machine.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Measurement = Callable[..., list[float]]


class Worker:
    """A process that runs one measurement on request; use it in a `with` block.

    Args:
        prepare: called once in the process, with `arguments`; returns the function that measures.
        cores: the cores that the process is bound to.
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
        """Wait for the measurement that was begun, and return its values in milliseconds."""
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
    """Load a model to time its `generate`: milliseconds to the first token, then to each next."""
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    model.to(device).eval()

    class Clock(BaseStreamer):  # type: ignore[misc]
        """Notes the time of each token; the first call is for the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            """Do nothing: the caller reads the times."""

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
