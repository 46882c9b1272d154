"""Per-token latency of transformers, the sequential plan, and concurrent plans, taking turns.

Every configuration stays loaded, and each repeat measures all of them one after another, so that
whatever else the machine does affects all alike. Ratios within one run are meaningful; absolute
times on a shared machine are less so.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cqil_dist.progress import ConsoleProgress, Progress

if TYPE_CHECKING:
    from cqil_dist.benchmarks.workers import Worker

PROMPT = (
    "A city by the sea has a harbour, a market and a tall white lighthouse. Every morning the "
    "fishing boats come home, and the people of the town walk down to"
)


@dataclass
class Result:
    """The measurements of one configuration.

    Attributes:
        name: "transformers", or the plan as it was given.
        plan: the plan's JSON; None for transformers.
        ttft_ms: time to first token of each repeat, in milliseconds.
        itl_ms: inter-token latencies of each repeat, in milliseconds.
        predicted_ms: time of the serial path's layers and head, without exchanges, in milliseconds.
        exchange_us: median microseconds of a round: "transfer" of the data, and "skew", the wait
            for the slower rank.
    """

    name: str
    depth: int
    ranks: int
    plan: dict[str, Any] | None = None
    exchanges_per_token: float = 0.0
    ttft_ms: list[float] = field(default_factory=list)
    itl_ms: list[list[float]] = field(default_factory=list)
    predicted_ms: float | None = None
    exchange_us: dict[str, float] | None = None

    @property
    def itl_p50_ms(self) -> float:
        return statistics.median(value for repeat in self.itl_ms for value in repeat)

    @property
    def repeat_medians_ms(self) -> list[float]:
        return [statistics.median(repeat) for repeat in self.itl_ms]

    @property
    def itl_p90_ms(self) -> float:
        return float(np.percentile([value for repeat in self.itl_ms for value in repeat], 90))

    def to_dict(self) -> dict[str, Any]:
        derived = ("itl_p50_ms", "itl_p90_ms", "repeat_medians_ms")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class LayerTimes:
    """The milliseconds of a layer and the head, on a core alone or on all ranks' cores at once."""

    layer_alone: float
    layer_together: float
    head_together: float
    head_whole_alone: float


@dataclass(frozen=True)
class Case:
    """The model and the numbers of tokens that every configuration computes."""

    model: str
    device: str
    dtype: str
    prompt_tokens: int
    output_tokens: int


def measure(
    case: Case, plans: Sequence[str], ranks: int, repeats: int, address: str | None, strategy: str
) -> tuple[list[Result], LayerTimes | None, list[str]]:
    """Run the latency benchmark.

    Args:
        plans: the concurrent plans, each on `ranks` ranks.
        repeats: measurements of each configuration, after one to warm up.
        address: of a Ray cluster; None takes RAY_ADDRESS, else starts a local cluster, whose ranks
            are bound to cores.

    Returns:
        The results of transformers, the sequential plan and each plan; the layer times that the
        serial paths are predicted from, which are measured on a local cluster's CPUs alone; and the
        addresses of the nodes that had a rank.
    """
    from cqil_dist.benchmarks.workers import Worker, prepare_transformers
    from cqil_dist.launching.placement import connected
    from cqil_dist.launching.running_engine import launch
    from cqil_dist.rank.layer_timing import prepare_layers
    from cqil_dist.store.store import resolve
    from cqil_dist.store.tokenizer import load_tokenizer

    progress = ConsoleProgress()
    path = resolve(case.model, progress)
    text_ids = load_tokenizer(path)(PROMPT)["input_ids"]
    prompt_ids = (text_ids * case.prompt_tokens)[: case.prompt_tokens]
    max_len = case.prompt_tokens + case.output_tokens
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        local = stack.enter_context(connected(address, 1 + ranks * len(plans), verbose=False))
        bound = case.device == "cpu" and local
        with progress.task("Loading transformers"):
            transformers = stack.enter_context(
                Worker(prepare_transformers, (cores[0],), path, case.device, case.dtype)
            )
            workers = [
                stack.enter_context(Worker(prepare_layers, (core,), path, ranks, max_len))
                for core in (cores[:ranks] if bound else ())
            ]
        options: dict[str, Any] = {
            "strategy": strategy,
            "device": case.device,
            "dtype": case.dtype,
            "slots": 1,
            "max_len": max_len,
            "prefill_tokens": case.prompt_tokens,
            "gpus_per_rank": 1 / (1 + ranks * len(plans)),
            "pin": bound,
            "progress": progress,
        }
        engines = {
            plan: stack.enter_context(launch(case.model, plan, world, **options))
            for plan, world in [("sequential", 1), *((plan, ranks) for plan in plans)]
        }
        results = {"transformers": Result("transformers", engines["sequential"].plan.depth, 1)}
        runs = {"transformers": partial(transformers.measure, prompt_ids, case.output_tokens)}
        for name, engine in engines.items():
            plan = engine.plan
            results[name] = Result(name, plan.depth, engine.assignment.world, plan.to_json())
            runs[name] = partial(_generate, engine, prompt_ids, case.output_tokens)
        position = case.prompt_tokens + case.output_tokens // 2
        layers = _take_turns(runs, results, workers, position, repeats, progress)
        for name, engine in engines.items():
            result = results[name]
            result.exchanges_per_token = engine.exchanges_per_token()
            result.exchange_us = _exchange_times(engine.exchange_stats())
            if layers is not None:
                result.predicted_ms = _predicted(engine, layers)
        nodes = {rank.address for engine in engines.values() for rank in engine.status().ranks}
    return list(results.values()), layers, sorted(nodes)


def _take_turns(
    runs: Mapping[str, Callable[[], list[float]]],
    results: Mapping[str, Result],
    workers: Sequence[Worker],
    position: int,
    repeats: int,
    progress: Progress,
) -> LayerTimes | None:
    """Measure all configurations in turns, and between the turns the layers on the workers."""
    layer_times: list[LayerTimes] = []
    with progress.task("Measuring", total=(repeats + 1) * len(runs), unit="runs") as task:
        for repeat in range(-1, repeats):  # repeat -1 warms up
            for name, run in runs.items():
                first, *later = run()
                if repeat >= 0:
                    results[name].ttft_ms.append(first)
                    results[name].itl_ms.append(later)
                task.advance()
            if workers:
                layer_times.append(_layer_times(workers, position))
    return _median_times(layer_times[1:]) if layer_times else None


def _generate(engine: Any, prompt_ids: list[int], max_tokens: int) -> list[float]:
    """Return the milliseconds to an engine's first token, and then to each further one."""
    timings = engine.complete(
        prompt_ids, max_tokens=max_tokens, temperature=0, ignore_eos=True
    ).timings
    return [timings.ttft_ms, *timings.itl_ms]


def _layer_times(workers: Sequence[Worker], position: int, repetitions: int = 20) -> LayerTimes:
    """Time layers and heads on one core while the others are idle, then on all cores at once."""

    def medians(values: list[float]) -> tuple[float, float]:
        return statistics.median(values[0::2]), statistics.median(values[1::2])

    layer_alone, head_alone = medians(workers[0].measure(position, repetitions))
    for worker in workers:
        worker.begin(position, repetitions)
    together = [medians(worker.result()) for worker in workers]
    return LayerTimes(
        layer_alone=layer_alone,
        layer_together=max(layer for layer, _ in together),
        head_together=max(head for _, head in together),
        head_whole_alone=head_alone * len(workers),
    )


def _median_times(samples: Sequence[LayerTimes]) -> LayerTimes:
    values = zip(*(astuple(sample) for sample in samples), strict=True)
    return LayerTimes(*(statistics.median(column) for column in values))


def _predicted(engine: Any, times: LayerTimes) -> float:
    """Predict a serial path's milliseconds: shared groups at busy cores' pace, others alone."""
    if engine.assignment.world == 1:
        return float(engine.plan.depth * times.layer_alone + times.head_whole_alone)
    shared = sum(len(stage.workers) > 1 for stage in engine.assignment.stages)
    alone = engine.plan.depth - shared
    return float(shared * times.layer_together + alone * times.layer_alone + times.head_together)


def _exchange_times(snapshots: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    from cqil_dist.benchmarks.round_times import split_transfer_and_skew

    times = split_transfer_and_skew(snapshots)
    if not len(times.transfer_s):
        return None
    return {
        "transfer": 1e6 * statistics.median(times.transfer_s.tolist()),
        "skew": 1e6 * statistics.median(times.skew_s.tolist()),
    }
