"""Figures of a measurement, for its JSON and its table.

Names and meanings of vLLM's serving benchmark where it has the figure; throughputs are per second
of the runs' duration, latencies in milliseconds.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from cqil_dist.benchmarks.serve import prompts
from cqil_dist.benchmarks.serve.answer import Answer
from cqil_dist.benchmarks.serve.measure import Load, Measurement
from cqil_dist.benchmarks.serve.peer import Peer
from cqil_dist.benchmarks.serve.run import RunResult
from cqil_dist.outputs import percentile

_KINDS_OF_FAILURE = 20


def report(
    peer: Peer,
    load: Load,
    measurement: Measurement,
    percentiles: Sequence[float],
    client: dict[str, Any],
) -> dict[str, Any]:
    """All that serve.json says.

    Args:
        percentiles: 0 to 100.
        client: what this program ran on.
    """
    paced = math.isfinite(load.request_rate)
    return {
        "setting": _setting(peer, load, measurement)
        | {"percentiles": list(percentiles), "client": client | {"httpx": version("httpx")}},
        "interrupted": measurement.interrupted,
        "client_attention": _worst_attention(measurement.runs),
        "results": results(measurement.runs, percentiles, paced=paced),
    }


def _setting(peer: Peer, load: Load, measurement: Measurement) -> dict[str, Any]:
    """What was measured, without secrets; infinity by its name, for JSON has none."""
    listing, form = measurement.listing, measurement.form
    assert listing is not None, "a measurement that returns has heard from its peer"
    assert form is not None, "and has agreed with it"
    return asdict(load) | {
        "base_url": peer.shown,
        "served_by": listing.owner,
        "server": listing.server,
        "model": form.model,
        "request_rate": load.request_rate if math.isfinite(load.request_rate) else "inf",
        "ignore_eos": form.ignore_eos,
        "ignore_eos_refused": load.ignore_eos and not form.ignore_eos,
        "include_usage_refused": not form.include_usage,
        "prompts": {"hash": prompts.content_hash(), "count": len(prompts.PROMPTS)},
        "started": measurement.started,
    }


def results(
    runs: Iterable[RunResult], percentiles: Sequence[float], *, paced: bool
) -> list[dict[str, Any]]:
    """One entry a concurrency, in the order they were first run, of all its repeats together.

    Args:
        percentiles: 0 to 100.
        paced: requests had moments at which they were due, so that queueing says something.
    """
    by_bound: dict[int | None, list[RunResult]] = {}
    for run in runs:
        if run.answers:
            by_bound.setdefault(run.max_concurrency, []).append(run)
    return [_result(bound, each, percentiles, paced) for bound, each in by_bound.items()]


def _result(
    bound: int | None, runs: Sequence[RunResult], percentiles: Sequence[float], paced: bool
) -> dict[str, Any]:
    answers = [answer for run in runs for answer in run.answers]
    good = [answer for answer in answers if answer.failure is None]
    failures = Counter(answer.failure for answer in answers if answer.failure is not None)
    duration_s = sum(run.duration_s for run in runs)
    return {
        "max_concurrency": bound,
        "completed": len(good),
        "failed": failures.total(),
        "failures": dict(failures.most_common(_KINDS_OF_FAILURE)),
        "duration": duration_s,
        "max_concurrent_requests": max(run.peak for run in runs),
        **_throughput(good, duration_s),
        **_latencies(good, percentiles, paced),
        "repeats": [_repeat(run) for run in runs],
    }


def _throughput(good: Sequence[Answer], duration_s: float) -> dict[str, Any]:
    """Of answers that count. Prompt tokens are known where the peer tells of all of them."""
    counted = [answer.prompt_tokens for answer in good if answer.prompt_tokens is not None]
    inputs = sum(counted) if len(counted) == len(good) else None
    outputs = sum(answer.output_tokens for answer in good)
    events = sum(len(answer.text_s) for answer in good)
    return {
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "output_tokens_from": _counted_from(good),
        "output_tokens_per_event": outputs / events if events else None,
        "request_throughput": _rate(len(good), duration_s),
        "output_throughput": _rate(outputs, duration_s),
        "total_token_throughput": None if inputs is None else _rate(inputs + outputs, duration_s),
    }


def _counted_from(good: Sequence[Answer]) -> str | None:
    """ "usage", "events", "mixed", or None where there is nothing to count."""
    sources = {"events" if answer.completion_tokens is None else "usage" for answer in good}
    return "mixed" if len(sources) > 1 else next(iter(sources), None)


def _rate(count: float, duration_s: float) -> float | None:
    return count / duration_s if duration_s > 0 else None


def _latencies(
    good: Sequence[Answer], percentiles: Sequence[float], paced: bool
) -> dict[str, float | None]:
    values = {
        "ttft": [answer.ttft_ms for answer in good],
        "tpot": [answer.tpot_ms for answer in good if answer.tpot_ms is not None],
        "itl": [gap for answer in good for gap in answer.itl_ms],
        "e2el": [answer.e2el_ms for answer in good],
    }
    if paced:
        values["queueing"] = [answer.queueing_ms for answer in good]
    figures: dict[str, float | None] = {}
    for name, of_name in values.items():
        for kind, figure in _statistics(of_name, percentiles).items():
            figures[f"{kind}_{name}_ms"] = figure
    return figures


def _statistics(values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    kinds = ["mean", "median", "std", *(f"p{percent:g}" for percent in percentiles)]
    if not values:
        return dict.fromkeys(kinds, None)
    mean = statistics.fmean(values)
    std = math.sqrt(statistics.fmean((value - mean) ** 2 for value in values))
    percents = (percentile(values, percent) for percent in percentiles)
    return dict(zip(kinds, [mean, statistics.median(values), std, *percents], strict=True))


def _repeat(run: RunResult) -> dict[str, Any]:
    """Of one repeat alone: how far repeats lie apart says how far to trust their union."""
    good = [answer for answer in run.answers if answer.failure is None]
    medians = _latencies(good, (), paced=False)
    return {
        "duration": run.duration_s,
        "output_throughput": _throughput(good, run.duration_s)["output_throughput"],
        **{name: value for name, value in medians.items() if name.startswith("median_")},
        "client": None if run.attention is None else asdict(run.attention),
    }


def _worst_attention(runs: Iterable[RunResult]) -> dict[str, float] | None:
    """The client's at its worst in any run; None where nothing was watched."""
    watched = [asdict(run.attention) for run in runs if run.attention is not None]
    return {name: max(each[name] for each in watched) for name in watched[0]} if watched else None
