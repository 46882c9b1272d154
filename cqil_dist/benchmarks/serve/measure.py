"""The whole measurement: who is there, in which form it takes requests, and runs taking turns.

Every repeat runs all concurrencies one after another, so that what else the machines do falls on
all alike. All runs ask the same prompts in the same order at the same moments.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpx

from cqil_dist.benchmarks.serve import prompts
from cqil_dist.benchmarks.serve.agreement import agree
from cqil_dist.benchmarks.serve.arrivals import arrivals
from cqil_dist.benchmarks.serve.attention import WatchedSelector
from cqil_dist.benchmarks.serve.peer import Listing, Peer, choose_model, list_models
from cqil_dist.benchmarks.serve.request_form import Endpoint, RequestForm
from cqil_dist.benchmarks.serve.run import Run, RunResult
from cqil_dist.errors import CqilError
from cqil_dist.progress import Progress


@dataclass(frozen=True)
class Load:
    """What is asked of the peer, and how fast.

    Attributes:
        model: None for the first one it lists.
        num_prompts: requests of a run.
        request_rate: requests per second; infinity sends all at once.
        burstiness: shape of the gaps between arrivals (`arrivals`).
        max_concurrency: one run each in every repeat; None for no bound.
        output_len: most tokens of an answer.
        seed: of the order of prompts and of the arrivals.
        num_warmups: requests before the first run, counted nowhere.
        unique_prompts: begin every prompt with a number drawn anew each time, so that no peer has
            it in a prefix cache from an earlier request.
        timeout_s: most seconds of one answer.

    Raises:
        CqilError: a value is out of its range.
    """

    endpoint: Endpoint = Endpoint.COMPLETIONS
    model: str | None = None
    num_prompts: int = 48
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: tuple[int | None, ...] = (None,)
    repeats: int = 1
    output_len: int = 64
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 0
    num_warmups: int = 3
    unique_prompts: bool = False
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        bounds = [bound for bound in self.max_concurrency if bound is not None]
        counts = (self.num_prompts, self.repeats, self.output_len, min(bounds, default=1))
        names = ("num_prompts", "repeats", "output_len", "max_concurrency")
        for name, count in zip(names, counts, strict=True):
            if count < 1:
                raise CqilError(f"{name} is {count}, but has to be 1 at least")
        for name in ("request_rate", "burstiness", "timeout_s"):
            if not (value := getattr(self, name)) > 0:  # nor is NaN
                raise CqilError(f"{name} is {value:g}, but has to be above 0")
        for name in ("temperature", "num_warmups"):
            if not (value := getattr(self, name)) >= 0:
                raise CqilError(f"{name} is {value:g}, but has to be 0 at least")


@dataclass
class Measurement:
    """What was found so far.

    Attributes:
        started: ISO time at which the first run began.
        form: the fields that were asked in, without those that the peer refused.
        runs: in the order they ran.
        interrupted: by Ctrl-C.
    """

    listing: Listing | None = None
    form: RequestForm | None = None
    started: str | None = None
    runs: list[RunResult] = field(default_factory=list)
    interrupted: bool = False


def measure(peer: Peer, load: Load, progress: Progress) -> Measurement:
    """Measure. Ctrl-C ends it with what there is so far.

    Raises:
        CqilError: the peer is not there, does not let us in, or takes no such request at all.
        KeyboardInterrupt: before the first answer.
    """
    measurement = Measurement()
    watched = WatchedSelector()
    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(watched)) as runner:
            runner.run(_measure(peer, load, progress, watched, measurement))
    except KeyboardInterrupt:
        if not any(run.answers for run in measurement.runs):
            raise
        measurement.interrupted = True
    return measurement


async def _measure(
    peer: Peer, load: Load, progress: Progress, watched: WatchedSelector, found: Measurement
) -> None:
    async with peer.client() as client:
        found.listing = await list_models(client, peer)
        asked = RequestForm(
            load.endpoint,
            choose_model(load.model, found.listing, peer),
            load.output_len,
            load.temperature,
            load.ignore_eos,
        )
        found.form = await agree(client, peer, found.listing, asked, load.timeout_s)
        await _warm_up(client, load, found.form, watched, progress)
        found.started = datetime.now(UTC).isoformat(timespec="seconds")
        total = load.repeats * len(load.max_concurrency) * load.num_prompts
        with progress.task(f"Measuring {peer.shown}", total=total, unit="requests") as task:
            for _ in range(load.repeats):
                for bound in load.max_concurrency:
                    run = Run(bound, watched, task.advance)
                    try:
                        await _run(run, client, load, found.form)
                    finally:
                        found.runs.append(run.result())


async def _warm_up(
    client: httpx.AsyncClient,
    load: Load,
    form: RequestForm,
    watched: WatchedSelector,
    progress: Progress,
) -> None:
    """As many at once as the largest run has: the peer's batches and the connections get warm."""
    count = load.num_warmups
    if count:
        bounds = [bound or count for bound in load.max_concurrency]
        with progress.task("Warming up", total=count, unit="requests") as task:
            requests = _requests(client, load, form, count)
            run = Run(max(bounds), watched, task.advance)
            await run.send(client, requests, [0.0] * count, load.timeout_s)


async def _run(run: Run, client: httpx.AsyncClient, load: Load, form: RequestForm) -> None:
    requests = _requests(client, load, form, load.num_prompts)
    moments = arrivals(load.num_prompts, load.request_rate, load.burstiness, load.seed)
    await run.send(client, requests, moments, load.timeout_s)


def _requests(
    client: httpx.AsyncClient, load: Load, form: RequestForm, count: int
) -> list[httpx.Request]:
    """Built before the clock starts."""
    texts = prompts.chosen(count, load.seed)
    if load.unique_prompts:
        texts = [prompts.made_unique(text) for text in texts]
    return [form.request(client, text) for text in texts]
