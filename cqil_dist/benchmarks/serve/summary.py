"""The figures of a measurement, for its JSON and its tables.

Figures that vLLM's serving benchmark has too have its names and meanings. Throughputs are per
second of the runs' duration, latencies in milliseconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from cqil_dist.benchmarks.serve import prompts
from cqil_dist.benchmarks.serve.load import Load
from cqil_dist.benchmarks.serve.measure import Measurement
from cqil_dist.benchmarks.serve.run import Run
from cqil_dist.benchmarks.serve.stream import Answer
from cqil_dist.benchmarks.serve.target import Target

_STATISTICS: dict[str, Callable[[Sequence[float]], Any]] = {
    "mean": np.mean,
    "std": np.std,
    "median": np.median,
    **{f"p{percent}": partial(np.percentile, q=percent) for percent in (50, 90, 99)},
}


def report(
    target: Target, load: Load, found: Measurement, client: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of serve.json.

    Args:
        client: the machine and software that this program ran on.
    """
    paced = math.isfinite(load.request_rate)
    setting = asdict(load) | {
        "base_url": target.shown,
        "served_by": found.listing.owner,
        "server": found.listing.server,
        "model": found.model,
        "request_rate": load.request_rate if paced else "inf",  # JSON has no infinity
        "prompts": {"hash": prompts.content_hash(), "count": len(prompts.PROMPTS)},
        "started": found.started,
        "client": client | {"httpx": version("httpx")},
    }
    return {
        "setting": setting,
        "interrupted": found.interrupted,
        "client_cpu_share": max(run.client_cpu_share for run in found.runs),
        "results": results(found.runs, paced=paced),
    }


def results(runs: Iterable[Run], *, paced: bool) -> list[dict[str, Any]]:
    """Return each concurrency's figures over all its repeats, in the order they were first run.

    Args:
        paced: whether requests were due one by one, so that the time they queued is meaningful.
    """
    by_bound: dict[int | None, list[Run]] = {}
    for run in runs:
        if run.answers:
            by_bound.setdefault(run.max_concurrency, []).append(run)
    return [_result(bound, each, paced) for bound, each in by_bound.items()]


def _result(bound: int | None, runs: Sequence[Run], paced: bool) -> dict[str, Any]:
    answers = [answer for run in runs for answer in run.answers]
    good = [answer for answer in answers if answer.failure is None]
    failures = Counter(answer.failure for answer in answers if answer.failure is not None)
    duration_s = sum(run.duration_s for run in runs)
    return {
        "max_concurrency": bound,
        "completed": len(good),
        "failed": failures.total(),
        "failures": dict(failures.most_common()),
        "duration": duration_s,
        "max_concurrent_requests": max(run.peak for run in runs),
        **_throughput(good, duration_s),
        **_latencies(good, paced),
        "repeats": [_repeat(run) for run in runs],
    }


def _throughput(good: Sequence[Answer], duration_s: float) -> dict[str, Any]:
    """Sum up successful answers' tokens and throughputs; prompt tokens only if all report them."""
    known = [answer.usage["prompt_tokens"] for answer in good if "prompt_tokens" in answer.usage]
    inputs = sum(known) if len(known) == len(good) else None
    outputs = sum(answer.output_tokens for answer in good)
    events = sum(len(answer.text_s) for answer in good)
    sources = {"usage" if "completion_tokens" in each.usage else "events" for each in good}
    return {
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "output_tokens_from": "mixed" if len(sources) > 1 else next(iter(sources), None),
        "output_tokens_per_event": outputs / events if events else None,
        "request_throughput": len(good) / duration_s,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": None if inputs is None else (inputs + outputs) / duration_s,
    }


def _latencies(good: Sequence[Answer], paced: bool) -> dict[str, float | None]:
    values = {
        "ttft": [answer.ttft_ms for answer in good],
        "tpot": [answer.tpot_ms for answer in good if answer.tpot_ms is not None],
        "itl": [gap for answer in good for gap in answer.itl_ms],
        "e2el": [answer.e2el_ms for answer in good],
    }
    if paced:
        values["queueing"] = [answer.queueing_ms for answer in good]
    return {
        f"{kind}_{name}_ms": float(statistic(of_name)) if of_name else None
        for name, of_name in values.items()
        for kind, statistic in _STATISTICS.items()
    }


def _repeat(run: Run) -> dict[str, Any]:
    """Return one repeat's figures: how far repeats differ tells how far to trust their union."""
    good = [answer for answer in run.answers if answer.failure is None]
    latencies = _latencies(good, paced=False)
    return {
        "duration": run.duration_s,
        "output_throughput": _throughput(good, run.duration_s)["output_throughput"],
        **{name: value for name, value in latencies.items() if name.startswith("median_")},
        "client_cpu_share": run.client_cpu_share,
    }
