"""The whole measurement of a server: its models, a test request, and runs taking turns.

Every repeat has a run of each concurrency, one after another, so that whatever else the machines do
affects all alike. All runs send the same prompts in the same order at the same moments.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpx

from cqil_dist.benchmarks.serve import prompts
from cqil_dist.benchmarks.serve.load import Load
from cqil_dist.benchmarks.serve.run import Run, arrivals
from cqil_dist.benchmarks.serve.stream import read, record
from cqil_dist.benchmarks.serve.target import Listing, Target, list_models
from cqil_dist.errors import RequestError, ServiceError, ServiceUnavailable
from cqil_dist.progress import Progress, Task

_PROBE = "The sea is"  # not one of the prompts: a prefix cache may keep it
_NO_ENDPOINT = (404, 405)
_REFUSALS = (400, *_NO_ENDPOINT, 422)


@dataclass
class Measurement:
    """The findings of a measurement so far.

    Attributes:
        model: the model that requests name.
        started: ISO time at which the first run began.
        runs: the runs, in order.
        interrupted: whether Ctrl-C ended the measurement.
    """

    listing: Listing = field(default_factory=Listing)
    model: str = ""
    started: str = ""
    runs: list[Run] = field(default_factory=list)
    interrupted: bool = False


def measure(target: Target, load: Load, progress: Progress) -> Measurement:
    """Measure a server under load; Ctrl-C ends the measurement with the answers so far.

    Raises:
        CqilError: the server cannot be reached, or refuses the key or the requests.
        KeyboardInterrupt: there was no answer yet.
    """
    found = Measurement()
    try:
        asyncio.run(_measure(target, load, progress, found))
    except KeyboardInterrupt:
        if not any(run.answers for run in found.runs):
            raise
        found.interrupted = True
    return found


async def _measure(target: Target, load: Load, progress: Progress, found: Measurement) -> None:
    async with target.client() as client:
        found.listing = await list_models(client, target)
        found.model = _choose_model(target, load, found.listing)
        await _probe(client, target, load, found)

        async def send(run: Run, due_s: list[float], task: Task) -> None:
            texts = prompts.chosen(len(due_s), load.seed)
            if load.unique_prompts:
                texts = [prompts.made_unique(text) for text in texts]
            requests = [load.request(client, found.model, text) for text in texts]
            await run.send(client, requests, due_s, load.timeout_s, task.advance)

        if count := load.num_warmups:
            # As many at once as in the largest run: the server's batches and connections warm up.
            run = Run(max(bound or count for bound in load.max_concurrency))
            with progress.task("Warming up", total=count, unit="requests") as task:
                await send(run, [0.0] * count, task)
        found.started = datetime.now(UTC).isoformat(timespec="seconds")
        due_s = arrivals(load.num_prompts, load.request_rate, load.burstiness, load.seed)
        total = load.repeats * len(load.max_concurrency) * load.num_prompts
        with progress.task(f"Measuring {target.shown}", total=total, unit="requests") as task:
            for bound in load.repeats * load.max_concurrency:
                found.runs.append(Run(bound))
                await send(found.runs[-1], due_s, task)


def _choose_model(target: Target, load: Load, listing: Listing) -> str:
    """Return the model that was asked for, or else the first one that the server lists."""
    if load.model is not None:
        return load.model
    if not listing.models:
        raise ServiceError(
            f"{target.shown}/v1/models lists no models: name one with --model, and check that "
            "this is the address of an OpenAI-compatible server"
        )
    return listing.models[0]


async def _probe(client: httpx.AsyncClient, target: Target, load: Load, found: Measurement) -> None:
    """Send one request, so that a mistake in all of them shows as one error, not as a failed run.

    A server that is busy or fails may answer the next request: the measurement counts its failures.
    """
    request = load.request(client, found.model, _PROBE)
    recording = await record(client, request, load.timeout_s, time.perf_counter())
    target.require_access(recording.status)
    failure = read(recording).failure
    if recording.status is None:
        raise ServiceUnavailable(f"{target.shown} gave no answer: {failure}")
    if recording.status in _REFUSALS:
        raise RequestError(
            f"{target.shown}{load.endpoint.path} refuses the request ({failure}): "
            f"{_way_out(load, found, recording.status)}"
        )


def _way_out(load: Load, found: Measurement, status: int) -> str:
    listed = found.listing.models
    if listed and found.model not in listed:
        return f"it lists no {found.model!r}; name with --model one of {', '.join(listed)}"
    if status in _NO_ENDPOINT:
        return "try another --endpoint or --model"
    fewer = ["leave out --ignore-eos"] * load.ignore_eos + ["give --no-usage"] * load.usage
    if fewer:
        return f"if it does not know a field, {' or '.join(fewer)}"
    return "try another --output-len, --temperature or --endpoint"
