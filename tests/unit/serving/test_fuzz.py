"""Random requests, and callers that vanish at any moment, after which the service works as before.

Everything random is drawn from fixed seeds.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import httpx
import psutil
import pytest
import schemathesis
from helpers.observed_engine import serving
from helpers.raw_http import Connection, ask, completion, request
from helpers.served import MODEL, PacedModel, Served, served
from helpers.tiny_models import VOCAB, TinyModel, TinyModelFactory
from helpers.watching import wait_for
from helpers.wire_requests import ANY_REQUESTS, SOME_REQUESTS, damaged_requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cqil_dist.rpc.v1 import generation_pb2 as pb

SLOTS = 4
# Prompt and completion together: what comes by chance generates up to the end.
MAX_LEN = 24
SERVICE = "/cqil_dist.rpc.v1.GenerationService"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
POSTS = ("/v1/completions", "/v1/chat/completions")
GETS = ("/v1/models", "/v1/models/{model}", "/health", "/metrics", "/status")

repeatable = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


@pytest.fixture(scope="module")
def steps(model: TinyModel) -> PacedModel:
    return PacedModel(model, SLOTS, 0)


@pytest.fixture(scope="module")
def service(model: TinyModel, steps: PacedModel) -> Iterator[Served]:
    with (
        serving(model, steps, slots=SLOTS, max_len=MAX_LEN, max_waiting=200) as engine,
        served(engine) as service,
    ):
        yield service


@pytest.fixture(scope="module")
def own_tasks(service: Served) -> int:
    """The number of tasks that the service has while it serves nobody."""
    return tasks_of(service)


@pytest.fixture(autouse=True)
def nothing_is_left(service: Served, own_tasks: int) -> Iterator[None]:
    """Check after each test that no request, task or connection is left and others are served."""
    yield
    assert ask(service, completion())[0] == 200
    wait_for(lambda: service.idle, "no request is left")
    wait_for(lambda: tasks_of(service) <= own_tasks, "no task is left")
    wait_for(lambda: not connections_to(service), "no connection is left")
    assert service.free_slots() == SLOTS


def tasks_of(service: Served) -> int:
    async def count() -> int:
        return len(asyncio.all_tasks()) - 1  # but for this one

    return service.run(count())


def ports_of(service: Served) -> list[int]:
    addresses = (service.addresses.http, service.addresses.grpc)
    return [int(address.rpartition(":")[2]) for address in addresses]


def connections_to(service: Served) -> list[Any]:
    """The service's ends of connections; the other ends are in this process, too."""
    return [
        each
        for each in psutil.Process().net_connections("tcp")
        if each.laddr.port in ports_of(service) and each.status != psutil.CONN_LISTEN
    ]


# By the OpenAPI document.


@pytest.fixture(scope="module")
def document(service: Served) -> Any:
    """The service's OpenAPI document, narrowed so that generated requests suit a tiny model."""
    found = httpx.get(f"{service.addresses.http}/openapi.json").json()
    schemas = found["components"]["schemas"]
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        fields = schemas[name]["properties"]
        fields["model"] = {"enum": [MODEL]}
        fields["n"]["maximum"] = 3
        fields.pop("best_of", None)  # as `n` only, which no schema says
    text = {"type": "string", "minLength": 1, "maxLength": 9}
    token_id = {"type": "integer", "minimum": 0, "maximum": VOCAB - 1}
    kinds = [text, *({"type": "array", "items": each, "minItems": 1} for each in (text, token_id))]
    schemas["CompletionRequest"]["properties"]["prompt"] = {"anyOf": kinds}
    schemas["Message"]["properties"]["content"] = {"type": "string", "maxLength": 2}
    schemas["ChatCompletionRequest"]["properties"]["messages"]["maxItems"] = 1
    return found


def operation(service: Served, document: Any, method: str, path: str) -> Any:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=service.addresses.http)
    return schema[path][method]


def test_the_document_tells_of_every_path(document: Any) -> None:
    assert set(document["paths"]) == {*POSTS, *GETS}


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", POSTS)
def test_answers_are_as_the_document_says(
    service: Served, document: Any, path: str, mode: GenerationMode
) -> None:
    """Answers follow the document for requests that follow it and for those that do not."""
    cases = operation(service, document, "POST", path).as_strategy(generation_mode=mode)
    statuses: Counter[int] = Counter()

    @settings(repeatable, max_examples=30)
    @given(case=cases)
    def holds(case: Any) -> None:
        statuses[case.call_and_validate(checks=CHECKS).status_code] += 1

    holds()
    if mode is GenerationMode.POSITIVE:
        assert statuses[200] >= 8, statuses
    else:
        assert statuses[400] >= 15, statuses


@pytest.mark.parametrize("path", GETS)
def test_what_is_looked_up_is_as_the_document_says(
    service: Served, document: Any, path: str
) -> None:
    cases = operation(service, document, "GET", path).as_strategy()

    @settings(repeatable, max_examples=5)
    @given(case=cases)
    def holds(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    holds()


# By gRPC.


@pytest.fixture
def unhurried(steps: PacedModel) -> Iterator[None]:
    """Slow steps, so that callers leave before everything has been computed."""
    steps.pace_s = 0.003
    yield
    steps.pace_s = 0


@pytest.fixture
def channel(service: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.addresses.grpc) as channel:
        yield channel


def outcome(channel: grpc.Channel, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    """Status code and details of a call that sends these bytes."""
    call = channel.unary_stream(f"{SERVICE}/{method}")(data, timeout=20)
    with suppress(grpc.RpcError):
        for _ in call:
            """Whatever it is."""
    return call.code(), call.details() or ""


def check_answer(channel: grpc.Channel, data: bytes, method: str = "Generate") -> None:
    """Check that these bytes are answered or refused, and do not make the server fail."""
    code, details = outcome(channel, method, data)
    known = grpc.StatusCode
    if code is known.UNKNOWN:  # gRPC's own word for what it cannot read
        assert "google.protobuf.message.DecodeError" in details
    else:
        assert code in (known.OK, known.INVALID_ARGUMENT, known.NOT_FOUND), f"{code}: {details}"


def test_any_values_are_answered_or_refused(channel: grpc.Channel) -> None:
    @settings(repeatable, max_examples=120)
    @given(message=ANY_REQUESTS)
    def holds(message: pb.GenerateRequest) -> None:
        check_answer(channel, message.SerializeToString())

    holds()


def test_damaged_requests_are_answered_or_refused(channel: grpc.Channel) -> None:
    @settings(repeatable, max_examples=120)
    @given(data=damaged_requests() | st.binary(max_size=200))
    def holds(data: bytes) -> None:
        check_answer(channel, data)

    holds()
    for message in SOME_REQUESTS:
        whole = message.SerializeToString()
        for end in range(len(whole)):
            check_answer(channel, whole[:end])


@pytest.mark.parametrize("method", ["Abort", "GetModelInfo", "GetStatus"])
def test_other_calls_take_any_bytes(channel: grpc.Channel, method: str) -> None:
    @settings(repeatable, max_examples=30)
    @given(data=st.binary(max_size=50))
    def holds(data: bytes) -> None:
        check_answer(channel, data, method)

    holds()


def test_methods_that_are_not_there_are_unimplemented(channel: grpc.Channel) -> None:
    for method in ("Generat", "generate", "", "Generate/", "../Generate", "G" * 5000):
        code, _ = outcome(channel, method, b"")
        assert code is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_that_is_too_large_is_refused(channel: grpc.Channel) -> None:
    code, details = outcome(channel, "Generate", b"\x0a" * (5 << 20))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in details


# By other protocols.

HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(194))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        request("GET", "/health"),
        completion(),
        HELLO,
        PREFACE + b"\xff" * 500,
        PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\x00" * 500,
        PREFACE[:10],
        b"\x00" * 5000,
        b"",
    ],
    ids=["GET", "POST", "TLS", "no frames", "frames", "half", "zeros", "nothing"],
)
@pytest.mark.parametrize("port", ["grpc", "http"])
def test_other_protocols_harm_nobody(service: Served, port: str, data: bytes) -> None:
    number = ports_of(service)[port == "grpc"]
    with socket.create_connection(("127.0.0.1", number), 5) as sock:
        with suppress(ConnectionError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            while sock.recv(1 << 16):
                """What it says does not matter, but that it ends."""
    with service.client() as client:
        assert len(client.generate("x", max_tokens=2, ignore_eos=True).token_ids) == 2


# By going away.


def vanish(sock: Connection, number: int) -> None:
    """Close a connection in one of two ways."""
    if number % 2:
        sock.reset()
    else:
        sock.close()


def test_http_callers_vanish_before_all_is_said(service: Served) -> None:
    """A caller vanishes after each byte of a request."""
    data = completion(stream=True, n=2)
    for sent in range(len(data) + 1):
        with Connection(service) as sock:
            sock.sendall(data[:sent])
            vanish(sock, sent)
    assert ask(service, request("GET", "/health")) == (200, "ok")


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("path", POSTS)
def test_http_callers_vanish_at_any_point_of_a_stream(service: Served, path: str) -> None:
    asked: dict[str, Any] = {"model": MODEL, "n": 2, "stream": True, "temperature": 0}
    if path == "/v1/completions":
        body = {**asked, "prompt": "x", "max_tokens": 9, "logprobs": 1}
    else:
        body = {**asked, "messages": [{"role": "user", "content": ""}], "logprobs": True}
    data = request("POST", path, json.dumps(body).encode(), "Content-Type: application/json")
    with Connection(service) as sock:
        sock.sendall(data)
        whole = sock.answer()[2]
    assert whole.endswith(b"data: [DONE]\n\n")
    for number, wanted in enumerate(range(1, len(whole), len(whole) // 40)):
        with Connection(service) as sock:
            sock.sendall(data)
            received = 0
            while received < wanted:
                part = sock.recv(wanted - received)
                assert part
                received += len(part)
            vanish(sock, number)
        assert ask(service, request("GET", "/health")) == (200, "ok")


def test_http_callers_vanish_while_they_wait(service: Served, steps: PacedModel) -> None:
    """Callers vanish while they wait for a whole answer, for a stream to begin, or for a slot."""
    with steps.held(), ExitStack() as stack:
        waiting = [stack.enter_context(Connection(service)) for _ in range(12)]
        for number, sock in enumerate(waiting):
            sock.sendall(completion(stream=number % 3 == 0, n=1 + number % 2))
        wait_for(lambda: service.service.requests == 18, "all have come")
        for number, sock in enumerate(waiting):
            vanish(sock, number // 2)
        wait_for(lambda: not service.service.requests, "all have left")


@pytest.mark.usefixtures("unhurried")
def test_grpc_callers_vanish_at_any_point_of_a_stream(service: Served) -> None:
    """A call is cancelled, or its connection is closed."""
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    with service.client() as client:
        count = len(list(client.generate("x", stream=True, **asked)))
        assert count == 12
        for number in range(count + 1):
            stream = client.generate("x", stream=True, **asked)
            for _ in range(number):
                next(stream)
            stream.close()  # type: ignore[attr-defined]
            assert client.status().state == "serving"
    for number in range(count + 1):
        client = service.client()
        stream = client.generate("x", stream=True, **asked)
        for _ in range(number):
            next(stream)
        client.close()
