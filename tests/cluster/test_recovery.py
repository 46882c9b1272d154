"""Processes are killed and stopped while requests stream, and the streams do not show it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psutil
import pytest
import ray
from helpers.tiny_models import TinyModel, TinyModelFactory, tiny_config
from helpers.watching import actors, wait_for

import cqil_dist as cqil
from cqil_dist.outputs import Chunk, Completion
from cqil_dist.status import RankStatus

REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "one", "temperature": 0},
    {"prompt": [5, 6, 7, 8] * 5, "temperature": 0.9, "seed": 11, "logprobs": 1},
    {"prompt": "three", "temperature": 1.1, "top_p": 0.9, "seed": 12},
)
MAX_LEN = 400


@pytest.fixture(scope="module")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    """A model with a context for streams that last long enough to be disturbed."""
    return tiny_model(tiny_config(max_position_embeddings=MAX_LEN))


def launch(model: TinyModel, **options: Any) -> cqil.RunningEngine:
    # Within 10 s a healthy rank answers also on a busy machine: recoveries are counted.
    options = {"step_deadline_s": 10, **options}
    return cqil.launch(str(model.path), "P2 S0 E6 D1", ranks=2, max_len=MAX_LEN, **options)


@pytest.fixture(scope="module")
def engine(cluster: None, model: TinyModel) -> Iterator[cqil.RunningEngine]:
    with launch(model) as engine:
        yield engine


def stream(
    engine: cqil.RunningEngine, request: dict[str, Any], under_way: threading.Barrier | None = None
) -> list[Chunk]:
    options = {"max_tokens": MAX_LEN - 40, "ignore_eos": True, **request}
    chunks: list[Chunk] = []
    for chunk in engine.generate(options.pop("prompt"), **options):
        chunks.append(chunk)
        if len(chunks) == 5 and under_way is not None:
            under_way.wait(timeout=60)
    return chunks


def check(chunks: list[Chunk], expected: Completion) -> None:
    """Check that chunks and completion have every expected token once, and nothing else."""
    result = chunks[-1].result
    assert result is not None
    assert tuple(id for chunk in chunks for id in chunk.token_ids) == expected.token_ids
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert (result.token_ids, result.text) == (expected.token_ids, expected.text)
    assert (result.finish_reason, result.usage) == (expected.finish_reason, expected.usage)
    assert len(result.timings.itl_ms) == len(expected.token_ids) - 1
    assert len(result.logprobs or ()) == len(expected.logprobs or ())
    for got, want in zip(result.logprobs or (), expected.logprobs or (), strict=True):
        assert got.token_id == want.token_id
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)


def disturb(engine: cqil.RunningEngine, fault: Callable[[], None]) -> None:
    """Stream all requests with a fault in their midst, and compare them with undisturbed ones."""
    expected = [stream(engine, request)[-1].result for request in REQUESTS]
    under_way = threading.Barrier(len(REQUESTS) + 1)
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        running = [pool.submit(stream, engine, request, under_way) for request in REQUESTS]
        under_way.wait(timeout=60)
        fault()
        for future, completion in zip(running, expected, strict=True):
            assert completion is not None
            check(future.result(timeout=90), completion)


def ranks_of(engine: cqil.RunningEngine) -> dict[int, RankStatus]:
    return {rank.rank: rank for rank in engine.status().ranks}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_replaced_and_the_others_stay(
    rank: int, engine: cqil.RunningEngine
) -> None:
    before, ranks = engine.status(), ranks_of(engine)
    disturb(engine, lambda: os.kill(ranks[rank].pid, signal.SIGKILL))
    after = engine.status()
    assert after.state == "serving"
    assert after.epoch > before.epoch
    assert after.recoveries == before.recoveries + 1
    assert ranks_of(engine)[1 - rank].pid == ranks[1 - rank].pid
    assert ranks_of(engine)[rank].pid != ranks[rank].pid
    assert after.last_recovery is not None
    assert f"rank {rank}" in after.last_recovery.cause
    assert after.last_recovery.phases.keys() == {"seat", "load", "connect", "prefill"}
    assert engine.exchanges_per_token() == engine.assignment.rounds


def test_recoveries_are_counted_in_ray_s_metrics(engine: cqil.RunningEngine) -> None:
    assert engine.status().recoveries > 0
    (node,) = ray.nodes()
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"

    def told(pattern: str) -> bool:
        with contextlib.suppress(OSError):
            text = urllib.request.urlopen(url, timeout=5).read().decode()
            return re.search(pattern, text, re.MULTILINE) is not None
        return False

    wait_for(lambda: told(r"^ray_cqil_recoveries\S* [1-9]"), "the counter")
    for phase in ("seat", "load", "connect", "prefill", "total"):
        wait_for(partial(told, rf'^ray_cqil_recovery_seconds_count\{{.*"{phase}"'), phase)


def test_a_stuck_rank_is_found_by_the_step_deadline(engine: cqil.RunningEngine) -> None:
    stuck = ranks_of(engine)[1].pid
    disturb(engine, lambda: os.kill(stuck, signal.SIGSTOP))
    assert ranks_of(engine)[1].pid != stuck
    wait_for(lambda: not psutil.pid_exists(stuck), "the stuck process ends", timeout_s=20)


def test_a_rank_lost_between_requests_is_back_for_the_next(engine: cqil.RunningEngine) -> None:
    before = engine.status()
    os.kill(ranks_of(engine)[0].pid, signal.SIGKILL)
    wait_for(lambda: engine.status().recoveries > before.recoveries, "the recovery")
    assert len(engine.complete("x", max_tokens=3, ignore_eos=True).token_ids) == 3


def test_a_killed_coordinator_takes_over_the_ranks_as_they_are(engine: cqil.RunningEngine) -> None:
    ranks, epoch = ranks_of(engine), engine.status().epoch
    (coordinator,) = actors("Coordinator")
    disturb(engine, lambda: os.kill(coordinator, signal.SIGKILL))
    assert engine.status().epoch > epoch
    assert {rank: s.pid for rank, s in ranks_of(engine).items()} == {
        rank: s.pid for rank, s in ranks.items()
    }


def test_a_rank_that_answers_but_can_do_nothing_is_started_again(
    engine: cqil.RunningEngine,
) -> None:
    """An error may stay with a process; here the process cannot open any more files."""
    ranks = ranks_of(engine)
    broken = psutil.Process(ranks[1].pid)

    def fault() -> None:
        broken.rlimit(psutil.RLIMIT_NOFILE, (3, broken.rlimit(psutil.RLIMIT_NOFILE)[1]))
        os.kill(ranks[0].pid, signal.SIGKILL)

    disturb(engine, fault)
    assert engine.status().state == "serving"
    assert ranks_of(engine)[1].pid != broken.pid


def test_a_spare_takes_over_without_reading_weights(cluster: None, model: TinyModel) -> None:
    """A spare replaces a killed rank and a stuck one; the replaced actor is the next spare."""
    with launch(model, spares=1, step_deadline_s=5) as engine:
        for fault in (signal.SIGKILL, signal.SIGSTOP):
            wait_for_a_spare(engine)
            ranks = ranks_of(engine)
            standby = actors("LayerActor") - {rank.pid for rank in ranks.values()}
            disturb(engine, partial(os.kill, ranks[1].pid, fault))
            assert ranks_of(engine)[0].pid == ranks[0].pid
            assert ranks_of(engine)[1].pid in standby
        wait_for_a_spare(engine)
        assert engine.status().recoveries == 2


def wait_for_a_spare(engine: cqil.RunningEngine) -> None:
    wait_for(lambda: engine.status().ready_spares == 1, "a spare is ready")
