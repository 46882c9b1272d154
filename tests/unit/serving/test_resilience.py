"""Clients and losses that must not bring a service down, or keep it from ending."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.observed_engine import PLAN, ObservedModel, serving
from helpers.served import served
from helpers.tiny_models import TinyModelFactory
from helpers.watching import wait_for

from cqil_dist.client.resuming import Backoff
from cqil_dist.errors import LaunchError, QueueFull, ServiceUnavailable
from cqil_dist.rpc.convert import sampling_to_wire
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.rpc.v1.generation_pb2_grpc import GenerationServiceStub
from cqil_dist.serving import backend
from cqil_dist.serving.admission import Admission
from cqil_dist.serving.health import HealthWatch


def test_a_burst_is_refused_in_part_and_the_service_stays(tiny_model: TinyModelFactory) -> None:
    """More requests come than the coordinator takes calls; its health is found all the same."""
    model = tiny_model()
    steps = ObservedModel(model, model.plan(PLAN), 2)
    with serving(model, steps, slots=2, max_waiting=4) as engine, served(engine) as service:

        def ask(prompts: int) -> int:
            body = {"model": "tiny", "prompt": ["x"] * prompts, "max_tokens": 2}
            return httpx.post(f"{service.addresses.http}/v1/completions", json=body).status_code

        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(ask, [6, 2, 6, 1, 6, 6, 3, 6] * 3))
        assert set(statuses) <= {200, 429}
        assert 429 in statuses
        assert not service.service.health.failed.is_set()
        wait_for(lambda: service.idle, "those that were refused are gone")
        assert ask(2) == 200
        assert ask(7) == 400, "more than can ever be within"
        assert httpx.get(f"{service.addresses.http}/health").status_code == 200


def test_watchers_without_a_key_shut_nobody_out(tiny_model: TinyModelFactory) -> None:
    model = tiny_model()
    steps = ObservedModel(model, model.plan(PLAN), 2)
    with (
        serving(model, steps, slots=2) as engine,
        served(engine, api_key="key") as service,
        grpc.insecure_channel(service.addresses.grpc) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(200)]
        refused = [watch for watch in watches if _code(watch) is grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert 100 < len(refused) < 200
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status
        with service.client() as client:
            assert client.generate("x", max_tokens=2, ignore_eos=True).token_ids
        for watch in watches:
            watch.cancel()


def test_a_grpc_client_that_does_not_read_is_let_go(
    tiny_model: TinyModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call ends in time though the connection lives; others are served meanwhile."""
    monkeypatch.setattr(backend, "_READING_S", 0.0)
    model = tiny_model()
    steps = ObservedModel(model, model.plan(PLAN), 2)
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    request = pb.GenerateRequest(text="x", model="tiny")
    request.sampling_params.MergeFrom(
        sampling_to_wire({"max_tokens": 60, "logprobs": 20, "ignore_eos": True})
    )
    with (
        serving(model, steps, slots=2) as engine,
        served(engine, request_timeout_s=2) as service,
        grpc.insecure_channel(service.addresses.grpc, options=options) as channel,
    ):
        unread = GenerationServiceStub(channel).Generate(request)
        wait_for(lambda: service.free_slots() == 2 and len(steps.steps) > 59, "it is generated")
        assert service.service.requests == 1, "and is being told"
        with service.client() as client:
            assert client.generate("x", max_tokens=2, ignore_eos=True).token_ids
        wait_for(lambda: service.idle, "it has been let go")
        with pytest.raises(grpc.RpcError, match="not read within 2 s"):
            list(unread)


def _code(watch: Any) -> Any:
    try:
        next(watch)
    except grpc.RpcError as error:
        return error.code()
    return None


def test_two_of_one_name_are_two() -> None:
    """A request that resumes may be admitted before its earlier call has ended."""
    admission = Admission(2)
    with admission.admitted("mine"):
        with admission.admitted("mine"):
            assert admission.in_progress == 2
            with pytest.raises(QueueFull), admission.admitted("another"):
                raise AssertionError("it was let in")
        assert admission.in_progress == 1
    assert admission.in_progress == 0


def test_draining_ends_though_nobody_can_be_sent_away() -> None:
    """The coordinator is lost as well, and does not answer."""

    async def never(request_id: str) -> bool:
        await asyncio.sleep(3600)
        return True

    async def drain() -> int:
        admission = Admission(2)
        with admission.admitted("stuck"):
            return await admission.drain(0.1, never, grace_s=0.2)

    started = time.monotonic()
    assert asyncio.run(drain()) == 1
    assert time.monotonic() - started < 5


class Answers:
    """A stand-in for a client, with the coordinator's next answers."""

    def __init__(self, *answers: Exception) -> None:
        self._answers = list(answers)

    async def status(self) -> Any:
        raise self._answers.pop(0)


def test_only_an_engine_that_is_gone_for_good_has_failed() -> None:
    passing = (
        QueueFull("calls"),
        ServiceUnavailable("gone"),
        RuntimeError("Ray's"),
        TimeoutError(),
    )

    async def look() -> None:
        watch = HealthWatch(Answers(*passing, LaunchError("dead")), bound_s=60)  # type: ignore[arg-type]
        for _ in passing:
            await watch.look()
            assert watch.serving
            assert not watch.failed.is_set()
        await watch.look()
        assert not watch.serving
        assert watch.failed.is_set()

    asyncio.run(look())


class Failure(grpc.RpcError):  # type: ignore[misc]
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "gone"


def test_patience_begins_anew_where_somebody_was_there() -> None:
    """A request may outlive many services; only the search for one is bounded."""
    backoff = Backoff(patience_s=0.2)
    backoff.next_wait_s(Failure(), False, "here")
    time.sleep(0.3)
    backoff.next_wait_s(Failure(), True, "here")
    time.sleep(0.3)
    with pytest.raises(ServiceUnavailable):
        backoff.next_wait_s(Failure(), False, "here")


def test_closing_an_asyncio_client_is_no_cancellation(tiny_model: TinyModelFactory) -> None:
    from cqil_dist.client import AsyncClient

    model = tiny_model()
    steps = ObservedModel(model, model.plan(PLAN), 2)

    async def ask(address: str) -> None:
        client = AsyncClient(address)
        asking = asyncio.ensure_future(
            client.generate("x", max_tokens=50, temperature=0, ignore_eos=True)
        )
        while not steps.started.is_set():
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(ServiceUnavailable, match="is closed"):
            await asking

    with serving(model, steps, slots=2) as engine, served(engine) as service:
        steps.started.clear()
        with steps.held():
            asyncio.run(asyncio.wait_for(ask(service.addresses.grpc), 30))
        wait_for(lambda: service.engine.status().free_slots == 2, "the slot is free")
