"""The public gRPC service over real connections: health, reflection, deadlines, keys, draining."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from helpers.observed_engine import PLAN, LostInStep, ObservedModel, serving
from helpers.served import PacedModel, Served, served
from helpers.tiny_models import TinyModelFactory
from helpers.tls import self_signed
from helpers.watching import wait_for

from cqil_dist.client import Client
from cqil_dist.engine.engine import StepModel
from cqil_dist.errors import (
    CqilError,
    ExchangeError,
    LaunchError,
    ModelNotFound,
    QueueFull,
    RequestError,
    RequestTimeout,
    ServiceUnavailable,
    Unauthenticated,
)
from cqil_dist.outputs import Chunk
from cqil_dist.serving.grpc_frontend import GENERATION_SERVICE
from cqil_dist.serving.serve_config import Tls

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LONG: dict[str, Any] = {"max_tokens": 50, "temperature": 0, "ignore_eos": True}
PACE_S = 0.1  # so that a caller who acts in the midst of `LONG` has seconds for it


@pytest.fixture
def steps(tiny_model: TinyModelFactory) -> PacedModel:
    """Steps that are as fast as they can be, unless a test sets a pace."""
    return PacedModel(tiny_model(), 2, 0)


@pytest.fixture
def service(tiny_model: TinyModelFactory, steps: ObservedModel) -> Iterator[Served]:
    with (
        serving(tiny_model(), steps, slots=2, max_waiting=1) as engine,
        served(engine, request_timeout_s=20) as service,
    ):
        yield service


def health_of(service: Served, name: str = GENERATION_SERVICE) -> int:
    with grpc.insecure_channel(service.addresses.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status)


def unfinished(service: Served) -> int:
    status = service.engine.status()
    return status.running_requests + status.waiting_requests


def all_slots_are_free(service: Served) -> bool:
    status = service.engine.status()
    return status.free_slots == status.slots and not status.waiting_requests


def test_health_and_reflection_say_what_is_there(service: Served) -> None:
    assert health_of(service) == health_of(service, "") == SERVING
    with grpc.insecure_channel(service.addresses.grpc) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {GENERATION_SERVICE, "grpc.health.v1.Health"} <= set(services)


def test_a_stream_is_what_the_whole_completion_is(service: Served) -> None:
    with service.client() as client:
        whole = client.generate("The harbour", seed=5, max_tokens=20, logprobs=2)
        chunks = list(
            client.generate("The harbour", seed=5, max_tokens=20, logprobs=2, stream=True)
        )
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert tuple(id for chunk in chunks for id in chunk.token_ids) == whole.token_ids
        assert tuple(lp for chunk in chunks for lp in chunk.logprobs or ()) == whole.logprobs
        result = chunks[-1].result
        assert result is not None
        assert (result.text, result.finish_reason) == (whole.text, "length")


def test_a_chat_is_laid_out_by_the_template(service: Served) -> None:
    with service.client() as client:
        asked = client.chat([{"role": "user", "content": "hi"}], temperature=0, max_tokens=5)
        same = client.generate("user: hi\nassistant: ", temperature=0, max_tokens=5)
    assert asked.token_ids == same.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [1, 5000]}, r"token ids \[5000\] lie outside the vocabulary"),
        ({"prompt": "x" * 500}, "may have 64"),
        ({"temperature": -1}, "temperature is -1"),
        ({"nonsense": 1}, "unknown sampling params"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_and_harms_no_other(
    service: Served, options: dict[str, Any], message: str
) -> None:
    asked: dict[str, Any] = {"prompt": "x", "max_tokens": 3, **options}
    with service.client() as client:
        with pytest.raises(RequestError, match=message):
            client.generate(asked.pop("prompt"), **asked)
        assert len(client.generate("x", max_tokens=3, ignore_eos=True).token_ids) == 3


def test_a_model_that_is_not_served_is_not_found(service: Served) -> None:
    with service.client() as client, pytest.raises(ModelNotFound, match="served: tiny"):
        client.generate("x", model="another")


def test_beyond_the_queue_requests_are_refused_and_those_within_are_not(
    service: Served, steps: ObservedModel
) -> None:
    with service.client() as client:
        answers: list[int] = []

        def ask() -> None:
            answers.append(len(client.generate("x", **LONG).token_ids))

        with steps.held():
            asking = [threading.Thread(target=ask) for _ in range(3)]
            for thread in asking:
                thread.start()
            wait_for(lambda: unfinished(service) == 3, "a full queue")
            with pytest.raises(QueueFull, match="all 2 slots are taken, and 1 requests wait"):
                client.generate("x", **LONG)
        for thread in asking:
            thread.join(30)
    assert answers == [50, 50, 50]


def test_a_deadline_ends_the_request_and_frees_its_slot(
    service: Served, steps: ObservedModel
) -> None:
    with service.client(timeout_s=0.5) as client, steps.held(), pytest.raises(RequestTimeout):
        client.generate("x", **LONG)
    wait_for(lambda: all_slots_are_free(service), "the slot is free")


def test_hanging_up_frees_the_slot_within_a_step(service: Served, steps: PacedModel) -> None:
    steps.pace_s = PACE_S
    with service.client() as client:
        stream = client.generate("x", **LONG, stream=True)
        next(stream)
        before = len(steps.steps)
        stream.close()  # type: ignore[attr-defined]
        wait_for(lambda: all_slots_are_free(service), "the slot is free")
    assert len(steps.steps) < before + 40, "it was not computed to its end"


def test_an_aborted_request_ends_with_what_it_has(service: Served, steps: PacedModel) -> None:
    steps.pace_s = PACE_S
    with service.client() as client:
        stream = client.generate("x", **LONG, stream=True, request_id="mine")
        first = next(stream)
        with steps.held():
            assert client.abort("mine")
        rest = list(stream)
        assert rest[-1].finish_reason == "abort"
        result = rest[-1].result
        assert result is not None
        assert result.text == first.text + "".join(chunk.text for chunk in rest)
        wait_for(lambda: not client.abort("mine"), "the name is free")


def test_a_request_under_a_name_in_use_ends_the_earlier_one(
    service: Served, steps: ObservedModel
) -> None:
    """This happens if a stream is resumed before the service has noticed that it broke."""
    with service.client() as client:
        with steps.held():
            first = client.generate("x", **LONG, stream=True, request_id="mine")
            ended: list[Chunk] = []
            reading = threading.Thread(target=lambda: ended.extend(first))
            reading.start()
            wait_for(lambda: service.engine.status().running_requests == 1, "the first runs")
            second = client.generate("x", **LONG, stream=True, request_id="mine")
            got: list[Chunk] = []
            reading_second = threading.Thread(target=lambda: got.extend(second))
            reading_second.start()
            wait_for(lambda: unfinished(service) == 2, "the second has come")
        reading.join(30)
        reading_second.join(30)
    assert ended[-1].finish_reason == "abort"
    assert got[-1].finish_reason == "length"


def test_draining_lets_nobody_in_and_lets_what_runs_finish(
    tiny_model: TinyModelFactory, steps: ObservedModel
) -> None:
    with (
        serving(tiny_model(), steps, slots=2) as engine,
        served(engine, drain_timeout_s=30) as service,
        service.client(patience_s=0) as client,
    ):
        stream = client.generate("x", **LONG, stream=True)
        chunks = [next(stream)]
        with steps.held():
            draining = threading.Thread(target=lambda: service.run(service.service.drain()))
            draining.start()
            wait_for(lambda: health_of(service) == NOT_SERVING, "health says so")
            with pytest.raises(ServiceUnavailable, match="the server is ending"):
                client.generate("x", **LONG)
        chunks += stream
        draining.join(30)
        assert not draining.is_alive()
    assert chunks[-1].finish_reason == "length"


def test_what_is_late_when_the_service_ends_goes_on_elsewhere(
    tiny_model: TinyModelFactory, steps: ObservedModel
) -> None:
    """A client that finds a successor misses no token and gets none twice."""
    model = tiny_model()
    with (
        serving(model, steps, slots=2) as engine,
        serving(model, ObservedModel(model, model.plan(PLAN), 2), slots=2) as other,
        served(engine, drain_timeout_s=0) as service,
        served(other) as successor,
    ):
        with successor.client() as client:
            expected = client.generate("x", **LONG)
        locate = lambda: successor.addresses.grpc  # noqa: E731
        with Client(service.addresses.grpc, locate=locate) as client:
            stream = client.generate("x", **LONG, stream=True)
            chunks = [next(stream) for _ in range(5)]
            service.run(service.service.drain())
            chunks += stream
    assert tuple(id for chunk in chunks for id in chunk.token_ids) == expected.token_ids
    assert "".join(chunk.text for chunk in chunks) == expected.text
    result = chunks[-1].result
    assert result is not None
    assert result.token_ids == expected.token_ids


def test_a_long_recovery_is_not_serving_and_a_short_one_is(tiny_model: TinyModelFactory) -> None:
    """Requests wait until the recovery has ended, and then go on."""
    model = tiny_model()
    found = threading.Event()

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        assert found.wait(30)
        return ObservedModel(model, model.plan(PLAN), 4), {}

    with (
        serving(model, LostInStep(model, 20), rebuild) as engine,
        served(engine, recovery_bound_s=3.0) as service,
        service.client() as client,
    ):
        stream = client.generate("x", **LONG, stream=True)
        chunks = [next(stream)]
        wait_for(lambda: client.status().state == "recovering", "the model is lost")
        assert health_of(service) == SERVING
        wait_for(lambda: health_of(service) == NOT_SERVING, "it takes too long")
        assert "lost rank 1" in service.service.health.detail
        found.set()
        chunks += stream
        wait_for(lambda: health_of(service) == SERVING, "it is well again")
    assert sum(len(chunk.token_ids) for chunk in chunks) == 50


def test_a_service_whose_engine_gave_up_says_so(tiny_model: TinyModelFactory) -> None:
    model = tiny_model()
    with serving(model, LostInStep(model, 30)) as engine, served(engine) as service:
        assert health_of(service) == SERVING
        with service.client(patience_s=0) as client, pytest.raises(CqilError, match="lost rank 1"):
            client.generate("x", **LONG)
        wait_for(lambda: health_of(service) == NOT_SERVING, "health says so")
        assert service.service.health.failed.is_set()
        assert "lost rank 1" in service.service.health.detail


def test_a_key_is_asked_of_every_call_but_health(tiny_model: TinyModelFactory) -> None:
    model = tiny_model()
    with (
        serving(model, ObservedModel(model, model.plan(PLAN), 2), slots=2) as engine,
        served(engine, api_key="open sesame") as service,
    ):
        with service.client() as client:
            assert client.generate("x", max_tokens=2, ignore_eos=True).token_ids
        for key in (None, "open sesamf", ""):
            with service.client(api_key=key) as client:
                for call in (client.status, client.models, lambda: client.generate("x")):
                    with pytest.raises(Unauthenticated, match="Bearer"):
                        call()
        assert health_of(service) == SERVING


def test_tls_is_spoken_and_the_certificate_checked(
    tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    model = tiny_model()
    tls = self_signed(tmp_path)
    other = self_signed(tmp_path / "other")
    with (
        serving(model, ObservedModel(model, model.plan(PLAN), 2), slots=2) as engine,
        served(engine, tls=tls) as service,
    ):
        with service.client(tls=True, ca_cert=tls.cert) as client:
            assert client.generate("x", max_tokens=2, ignore_eos=True).token_ids
        with (
            service.client(tls=True, ca_cert=other.cert, patience_s=0.5) as client,
            pytest.raises(ServiceUnavailable),
        ):
            client.status()
        with service.client(patience_s=0.5) as client, pytest.raises(ServiceUnavailable):
            client.status()
        check_https(service.addresses.http, tls, other)


def check_https(url: str, tls: Tls, other: Tls) -> None:
    """Check that the HTTP port speaks TLS, for streams as well, and nothing else."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "ignore_eos": True, "stream": True}
    trusted = ssl.create_default_context(cafile=str(tls.cert))
    with httpx.stream("POST", f"{url}/v1/completions", json=body, verify=trusted) as answer:
        events = [line for line in answer.iter_lines() if line]
    assert len(events) == 4
    assert events[-1] == "data: [DONE]"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{url}/health", verify=ssl.create_default_context(cafile=str(other.cert)))
    with pytest.raises(httpx.TransportError):
        httpx.get(url.replace("https", "http") + "/health")


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_a_port_that_is_taken_is_said(service: Served, kind: str) -> None:
    port = int(getattr(service.addresses, kind).rpartition(":")[2])
    http = port if kind == "http" else 0
    with (
        pytest.raises(LaunchError, match=f"cannot serve at 127.0.0.1:{port}"),
        served(service.engine, grpc_port=port if kind == "grpc" else 0, http_port=http),
    ):
        raise AssertionError("it started")
