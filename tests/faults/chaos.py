"""Injects faults at random moments while requests stream, and compares every token.

A head and three nodes are on one machine (`hosts.py`), with two ranks on nodes of their own and
room for one more. Streams run all the time; after a fault, the next is injected once tokens flow
again and the spares are ready. Every stream has to give the tokens that it gave before all faults.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from signal import SIGKILL, SIGSTOP
from typing import Any

from faults.hosts import Host, Network
from faults.remote import RemoteEngine, RemoteStream

from cqil_dist.errors import CqilError

FAULTS = ("kill", "stop", "link", "coordinator")
RANKS = 2

_PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "A city by the sea has a harbour, a market and a tall white lighthouse. Every morning",
    "def fibonacci(n):",
    "The three laws of motion are",
    "In the year 1969",
)
_RECOVERY_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Injected:
    """A fault that was injected.

    Attributes:
        fault: one of `FAULTS`.
        seconds: from the fault to the first token after the pause that it caused.
    """

    fault: str
    seconds: float


@dataclass
class ChaosReport:
    """The outcome of a run.

    Attributes:
        faults: the faults, in order.
        requests: how many streams ended, with or without an error.
        compared: how many tokens were compared with those of undisturbed answers.
        lost, doubled, wrong: how many tokens were missing at a stream's end, came beyond it, or
            were not the expected ones.
        failed: the messages of streams that ended with an error.
    """

    faults: list[Injected] = field(default_factory=list)
    requests: int = 0
    compared: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON, with a summary of the seconds to recover, by kind of fault."""
        kinds: dict[str, list[float]] = {}
        for injected in self.faults:
            kinds.setdefault(injected.fault, []).append(injected.seconds)
            kinds.setdefault("all", []).append(injected.seconds)
        summary = {
            kind: {"count": len(s), "median_s": statistics.median(s), "max_s": max(s)}
            for kind, s in sorted(kinds.items(), key=lambda item: item[0] == "all")
        }
        return {**asdict(self), "recovery": summary}


def run_chaos(
    network: Network,
    model: str,
    plan: str,
    *,
    minutes: float,
    faults: Sequence[str] = FAULTS,
    seed: int = 0,
    spares: int = 0,
    streams: int = 4,
    max_tokens: int = 64,
    step_deadline_s: float = 1.0,
    on_fault: Callable[[Injected], None] = lambda injected: None,
) -> ChaosReport:
    """Inject faults for some minutes, at least one of every kind.

    Args:
        network: four hosts with running Ray nodes.
        model: a directory that all hosts see.
        streams: how many requests stream at a time.
        on_fault: called after each recovery.

    Raises:
        CqilError: the engine did not recover.
    """
    with RemoteEngine(
        network.hosts[0],
        model=model,
        plan=plan,
        ranks=RANKS,
        strategy="STRICT_SPREAD",
        address="auto",
        max_len=256,
        slots=streams,
        spares=spares,
        step_deadline_s=step_deadline_s,
        recovery_timeout_s=_RECOVERY_TIMEOUT_S,
    ) as engine:
        load = _Load(engine, streams, max_tokens)
        injector = _Injector(network, engine, load, random.Random(seed), faults, spares)
        with load:
            end = time.monotonic() + 60 * minutes
            done = load.report.faults
            while (time.monotonic() < end or len(done) < len(faults)) and not load.report.failed:
                injected = injector.inject()
                done.append(injected)
                on_fault(injected)
        return load.report


class _Load:
    """Streams that run all the time, each of which is compared with its undisturbed answer."""

    def __init__(self, engine: RemoteEngine, streams: int, max_tokens: int) -> None:
        self.report = ChaosReport()
        self._engine = engine
        self._max_tokens = max_tokens
        self._expected = {prompt: self._begin(prompt).read().token_ids for prompt in _PROMPTS}
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[int, RemoteStream] = {}
        self._times: list[float] = []
        self._threads = [
            threading.Thread(target=self._stream, args=(index,), daemon=True)
            for index in range(streams)
        ]

    def __enter__(self) -> _Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(timeout=_RECOVERY_TIMEOUT_S)

    def tokens_since(self, moment: float) -> list[float]:
        """The times of all tokens that came after a moment, in order."""
        with self._lock:
            running = [time for stream in self._running.values() for time in list(stream.times)]
            times = [time for time in (*self._times, *running) if time > moment]
        return sorted(times)

    def forget_before(self, moment: float) -> None:
        with self._lock:
            self._times = [time for time in self._times if time >= moment]

    def _begin(self, prompt: str) -> RemoteStream:
        return self._engine.stream(
            prompt, max_tokens=self._max_tokens, temperature=0, ignore_eos=True
        )

    def _stream(self, index: int) -> None:
        turn = index
        while not self._ending.is_set():
            prompt = _PROMPTS[turn % len(_PROMPTS)]
            turn += 1
            stream = self._begin(prompt)
            with self._lock:
                self._running[index] = stream
            error = None
            try:
                stream.read(timeout_s=_RECOVERY_TIMEOUT_S)
            except CqilError as caught:
                error = str(caught)
            with self._lock:
                self._times += stream.times
                del self._running[index]
                self._compare(stream.token_ids, self._expected[prompt], error)

    def _compare(self, got: list[int], expected: list[int], error: str | None) -> None:
        report = self.report
        report.requests += 1
        report.compared += min(len(got), len(expected))
        report.wrong += sum(a != b for a, b in zip(got, expected, strict=False))
        report.doubled += max(0, len(got) - len(expected))
        if error is None:
            report.lost += max(0, len(expected) - len(got))
        else:
            report.failed.append(error)


class _Injector:
    """Injects one fault at a time, and waits until tokens flow again."""

    def __init__(
        self,
        network: Network,
        engine: RemoteEngine,
        load: _Load,
        rng: random.Random,
        faults: Sequence[str],
        spares: int,
    ) -> None:
        self._network = network
        self._engine = engine
        self._load = load
        self._random = rng
        self._faults = self._rounds(faults)
        self._spares = spares

    def inject(self) -> Injected:
        """Inject a fault at a random moment. Raises CqilError if the engine does not recover."""
        fault = next(self._faults)
        self._wait_for_spares()
        time.sleep(self._random.uniform(0.3, 2.0))
        status = self._engine.status()
        rank = self._random.choice(status["ranks"])
        host = self._network.host_at(rank["address"])
        cut_s = self._random.uniform(3, 12)
        self._load.forget_before(time.monotonic() - 60)
        started = time.monotonic()
        if fault == "kill":
            host.signal(rank["pid"], SIGKILL)
        elif fault == "stop":
            host.signal(rank["pid"], SIGSTOP)
        elif fault == "coordinator":
            head = self._network.hosts[0]
            for pid in head.processes("^ray::Coordinator"):
                head.signal(pid, SIGKILL)
        else:
            host.cut()
        resumed = self._wait(status["epoch"])
        if fault == "link":
            time.sleep(max(0.0, started + cut_s - time.monotonic()))
            host.restore()
            self._restart_node(host)
        return Injected(fault, self._pause_end(started, resumed) - started)

    def _rounds(self, faults: Sequence[str]) -> Iterator[str]:
        """Kinds of faults without end: each once in every round, in a random order."""
        while True:
            yield from self._random.sample(faults, len(faults))

    def _wait(self, epoch: int) -> float:
        """Wait until the ranks are in a new epoch and compute, and return the time then."""
        deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
        while True:
            status = self._engine.status()
            now = time.monotonic()
            rejoined = status["epoch"] > epoch and status["state"] == "serving"
            if rejoined and self._load.tokens_since(now - 0.2):
                return now
            if now > deadline or status["state"] == "failed":
                raise CqilError(f"the engine did not recover: {status['state_detail']}")
            time.sleep(0.05)

    def _wait_for_spares(self) -> None:
        deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
        while self._engine.status()["ready_spares"] < self._spares:
            if time.monotonic() > deadline:
                raise CqilError(f"no spare was ready within {_RECOVERY_TIMEOUT_S:g} s")
            time.sleep(0.2)

    def _pause_end(self, started: float, resumed: float) -> float:
        """The end of the longest pause between the fault and the time when tokens flowed again."""
        times = [started, *self._load.tokens_since(started)]
        gaps = [(after - before, after) for before, after in pairwise(times) if before < resumed]
        return max(gaps)[1] if gaps else resumed

    def _restart_node(self, host: Host) -> None:
        """Restart the Ray node of a host that has lost its rank, as an operator would.

        Ray may have given the node up.
        """
        if host.address not in {rank["address"] for rank in self._engine.status()["ranks"]}:
            host.kill_ray()
            self._network.start_ray()
