"""What the HTTP port puts up with from clients that are slow, wrong, or out to harm it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from statistics import median
from typing import Any

import httpx
import pytest
from observed_engine import PLAN, ObservedModel, serving
from raw_http import Connection, ask, completion, posted, request
from served import MODEL, Served, served
from tiny_models import TinyModel, TinyModelFactory
from watching import wait_for

from cqil_dist.errors import CqilError, Unauthenticated
from cqil_dist.runtime.engine import Engine
from cqil_dist.serving import http_server

MAX_BODY = 100_000
DRIBBLE_S = 0.05
JSON = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


@pytest.fixture(scope="module")
def engine(model: TinyModel) -> Iterator[Engine]:
    with serving(model, ObservedModel(model, model.plan(PLAN), 4)) as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[Served]:
    with served(engine, max_body_bytes=MAX_BODY) as service:
        yield service
        wait_for(lambda: service.idle, "no request is left")


@pytest.fixture(autouse=True)
def nothing_unexpected(service: Served, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After whatever came, a good request is answered; and no error was logged."""
    yield
    assert ask(service, completion())[0] == 200
    logged = caplog.get_records("call")
    errors = [record for record in logged if record.levelno >= logging.ERROR]
    assert not errors, errors[0].getMessage()


def dribbled(service: Served, data: bytes, seconds: float) -> tuple[float, bytes]:
    """Send a byte now and then until the service hangs up: after how long, and its last words."""
    began = time.monotonic()
    with Connection(service, timeout_s=DRIBBLE_S) as sock:
        for byte in data:
            with suppress(ConnectionError):
                sock.sendall(bytes([byte]))
            try:
                words = sock.recv(1 << 16)
            except TimeoutError:
                assert time.monotonic() - began < seconds, "it still listens"
                continue
            except ConnectionError:
                words = b""
            return time.monotonic() - began, words
    raise AssertionError("it took everything")


def dribble_on(sock: Connection, part: bytes) -> None:
    for _ in range(200):
        sock.sendall(part)
        time.sleep(DRIBBLE_S)


# Pace.


def test_an_answer_does_not_wait_for_acknowledgements(service: Served) -> None:
    """Headers and body go out as they come: TCP would hold the second back for 40 ms."""
    times: list[float] = []
    with Connection(service) as sock:
        for _ in range(20):
            began = time.monotonic()
            sock.sendall(request("GET", "/health"))
            assert sock.answer()[0] == 200
            times.append(time.monotonic() - began)
    assert median(times) < 0.03


def test_headers_must_come_in_time(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are served meanwhile, also one whose headers are slow, but not too slow."""
    monkeypatch.setattr(http_server, "_HEADERS_S", 0.6)
    slow = request("GET", "/health", b"", "X-Slow: " + "x" * 1000)
    seconds, words = dribbled(service, slow, 10)
    assert seconds > 0.5
    assert words == b""
    with Connection(service, timeout_s=10) as silent:
        assert silent.closes()
    with Connection(service, timeout_s=10) as patient:
        for part in (slow[:20], slow[20:]):
            patient.sendall(part)
            time.sleep(0.3)
        assert patient.answer()[0] == 200
        # An idle connection may stay, but not one that has begun another request.
        time.sleep(0.8)
        patient.sendall(request("GET", "/health"))
        assert patient.answer()[0] == 200
        patient.sendall(slow[:20])
        assert patient.closes()


@pytest.mark.parametrize("kind", [f"Content-Length: {MAX_BODY}", CHUNKED])
def test_bodies_must_come_in_time(
    engine: Engine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dribbled, or not at all; and what comes after the answer is not listened to for long."""
    monkeypatch.setattr(http_server, "_HEADERS_S", 0.3)
    begun = posted(b"", kind, JSON)
    part = b"1\r\n{\r\n" if kind == CHUNKED else b"{"
    with served(engine, body_timeout_s=0.5) as service, Connection(service) as sock:
        with Connection(service) as dribbling:
            sock.sendall(begun)
            dribbling.sendall(begun)
            for _ in range(12):
                dribbling.sendall(part)
                time.sleep(DRIBBLE_S)
                assert ask(service, request("GET", "/health")) == (200, "ok")
            for each in (sock, dribbling):
                status, headers, body = each.answer()
                assert (status, headers["content-type"]) == (408, "application/json")
                assert json.loads(body)["error"]["message"] == "the body did not come within 0.5 s"
            with pytest.raises(ConnectionError):
                dribble_on(dribbling, part)
        assert service.idle


def test_many_idle_connections_keep_nobody_out(service: Served) -> None:
    """Some have said nothing, some the half of a request, some have been answered."""
    with ExitStack() as stack:
        for number in range(150):
            sock = stack.enter_context(Connection(service))
            if number % 3 == 0:
                sock.sendall(completion()[:60])
            if number % 3 == 1:
                sock.sendall(request("GET", "/health"))
        began = time.monotonic()
        for _ in range(5):
            assert ask(service, completion())[0] == 200
        assert time.monotonic() - began < 5


# Size.


def test_a_body_that_says_it_is_too_large_is_not_read(service: Served) -> None:
    with Connection(service) as sock:
        sock.sendall(posted(b"", "Content-Length: 999999999999", JSON))
        status, _, body = sock.answer()
    assert status == 413
    assert json.loads(body)["error"]["message"] == "the body is larger than 100000 bytes"


def test_a_body_that_turns_out_too_large_is_refused(service: Served) -> None:
    """The rest of it may come, and then the next request."""
    chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    for path in ("/v1/completions", "/v1/nowhere"):
        with Connection(service) as sock:
            sock.sendall(request("POST", path, chunk * 5, CHUNKED, JSON))
            assert sock.answer()[0] == 413
            sock.sendall(chunk * 20 + b"0\r\n\r\n" + request("GET", "/health"))
            assert sock.answer()[0] == 200
    with Connection(service) as sock:
        sock.sendall(posted(b"{", f"Content-Length: {2 * MAX_BODY}", JSON))
        assert sock.answer()[0] == 413
        sock.sendall(b"x" * (2 * MAX_BODY - 1) + request("GET", "/health"))
        assert sock.answer()[0] == 200


def test_what_does_not_go_on_as_it_began_is_hung_up_on(service: Served) -> None:
    """Also where it has been answered already."""
    with Connection(service) as sock:
        sock.sendall(posted(b"8000\r\n" + b"x" * 0x8000 + b"\r\nno number\r\n", CHUNKED, JSON))
        assert sock.answer()[0] == 400
        assert sock.closes()
    with Connection(service) as sock:
        sock.sendall(posted((b"8000\r\n" + b"x" * 0x8000 + b"\r\n") * 5, CHUNKED, JSON))
        assert sock.answer()[0] == 413
        sock.sendall(b"no number\r\n")
        assert sock.closes()


def test_a_body_just_within_the_bound_is_read(service: Served) -> None:
    prompt = "x" * (MAX_BODY - len(json.dumps({"model": MODEL, "prompt": ""})))
    body = json.dumps({"model": MODEL, "prompt": prompt}).encode()
    assert len(body) == MAX_BODY
    status, error = ask(service, posted(body))
    assert status == 400
    assert "the prompt has" in error["error"]["message"]
    assert ask(service, posted(body + b" "))[0] == 413


def test_usual_clients_read_the_refusal_of_what_they_send(service: Served) -> None:
    """They send all of it first."""
    with httpx.Client(base_url=service.addresses.http, timeout=20) as client:
        for content in (b"x" * 3_000_000, (b"x" * 10_000 for _ in range(300))):
            assert client.post("/v1/completions", content=content).status_code == 413
            assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "mistakes",
    [
        '"prompt": [' + "1.5," * 300_000 + "1.5]",
        '"prompt": [' + "{}," * 300_000 + "{}]",
        '"prompt": "x", "stop_token_ids": [' + "-1," * 300_000 + "-1]",
        '"prompt": "x", "stop": [' + "1," * 300_000 + "1]",
    ],
    ids=["numbers", "objects", "stop tokens", "stops"],
)
def test_very_many_mistakes_are_one(engine: Engine, mistakes: str) -> None:
    """Telling them all apart would take a megabyte of them some 20 s, and all others with it."""
    with served(engine) as service:
        began = time.monotonic()
        body = f'{{"model": "{MODEL}", {mistakes}}}'.encode()
        status, error = ask(service, posted(body))
        assert time.monotonic() - began < 5
    assert status == 400
    assert len(error["error"]["message"]) < 1000


# Bodies that are not what they should be.


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"17",
        b"\x00",
        b"\xff\xfe{}",
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "x",}',
        b'{"model": "tiny", "prompt": "x"} {}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": ["x", "\\udfff\\ud800"]}',
        b'{"model": "tiny", "prompt": "x", "stop": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "\\ud800": 1}',
        b'{"model": "tiny", "prompt": "x", "logit_bias": {"\\ud800": 1}}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "x", "temperature": -Infinity}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "x", "presence_penalty": NaN}',
        b'{"model": "tiny", "prompt": "x", "n": 1e999}',
        b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 90_000,
        b'{"prompt":' * 9000,
        b'{"model": "tiny", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)
def test_what_is_not_json_of_the_right_kind_is_refused(service: Served, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, error = ask(service, request("POST", path, body, JSON))
        assert status == 400
        assert set(error["error"]) == {"message", "type", "param", "code"}
        assert error["error"]["type"] == "invalid_request_error"


def test_a_name_that_is_not_unicode_is_not_found(service: Served) -> None:
    assert ask(service, completion(model="\ud800"))[0] == 404
    for path in ("/v1/models/%ff", "/v1/models/%ed%a0%80", "/v1/models/%00"):
        assert ask(service, request("GET", path))[0] == 404


def test_a_prompt_may_hold_any_character(service: Served) -> None:
    for prompt in ("\0", "\N{PILE OF POO}", "\u202e\ufeff", "a\r\n\r\nHTTP/1.1 200 OK"):
        status, answered = ask(service, completion(prompt=prompt, echo=True, max_tokens=0))
        assert (status, answered["choices"][0]["text"]) == (200, prompt)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "nonsense", "multipart/form-data"]
)
def test_another_content_type_is_refused_with_a_hint(service: Served, kind: str) -> None:
    """curl sends the second unless it is told otherwise."""
    _, _, body = completion().partition(b"\r\n\r\n")
    status, error = ask(service, posted(body, f"Content-Type: {kind}"))
    assert status == 400
    assert "Content-Type: application/json" in error["error"]["message"]
    assert ask(service, posted(body, "Content-Type: application/json; charset=utf-8"))[0] == 200


# Headers, methods, connections.


@pytest.mark.parametrize(
    "data",
    [
        posted(b"{}", "Content-Length: 2", "Content-Length: 3"),
        posted(b"{}", "Content-Length: -1"),
        posted(b"{}", "Content-Length: 2, 3"),
        posted(b"{}", "Content-Length: " + "9" * 30),
        posted(b"{}", "Transfer-Encoding: gzip, chunked"),
        posted(b"no number\r\n", CHUNKED),
        request("GET", "/health", b"", "X: \0"),
        request("GET", "/health", b"", "X Y: z"),
        request("GET", "/health", b"", ": z"),
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health\r\n\r\n",
        "GET /hälth HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
        b"\x16\x03\x01\x02\x00\x01" + b"\x00" * 100,
        b"\x00" * 100,
    ],
)
def test_what_is_not_http_is_refused_and_hung_up_on(service: Served, data: bytes) -> None:
    with Connection(service) as sock:
        sock.sendall(data)
        assert sock.answer()[0] == 400
        assert sock.closes()


def test_headers_have_a_bound(service: Served) -> None:
    """Of 64 KiB, as they come."""
    assert (
        ask(service, request("GET", "/health", b"", *[f"X-{i}: {i}" for i in range(500)]))[0] == 200
    )
    with Connection(service) as sock:
        with suppress(ConnectionError):
            for _ in range(100):
                sock.sendall(b"GET /health HTTP/1.1\r\n" + b"X: " + b"x" * 10_000)
        assert sock.closes()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("GET", "http://elsewhere/health"), 404),
        (request("CONNECT", "localhost:80"), 404),
        (request("OPTIONS", "*"), 404),
        (request("BREW", "/health"), 405),
        (request("GET", "/../../etc/passwd"), 404),
        (request("GET", "/%2e%2e/%2e%2e/etc/passwd"), 404),
        (request("GET", "/" + "x" * 50_000), 404),
        (request("GET", "/health?" + "x" * 50_000), 200),
        (request("GET", "/health", b"", "Connection: upgrade", "Upgrade: websocket"), 200),
        (request("GET", "/health", b"x" * 1000), 200),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_odd_requests_have_plain_answers(service: Served, data: bytes, status: int) -> None:
    assert ask(service, data)[0] == status


def test_a_client_that_waits_to_be_asked_for_the_body_is_asked(service: Served) -> None:
    head, _, body = completion().partition(b"\r\n\r\n")
    with Connection(service) as sock:
        sock.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
        sock.sendall(body)
        assert sock.answer()[0] == 200


def test_requests_in_a_row_are_answered_in_order(service: Served) -> None:
    """Sent all at once, a stream among them."""
    seeds = (1, 2, 3)
    alone = [ask(service, completion(seed=seed, max_tokens=9))[1]["choices"] for seed in seeds]
    with Connection(service) as sock:
        pipelined = [completion(seed=seed, max_tokens=9) for seed in seeds]
        events = completion(stream=True, max_tokens=3)
        sock.sendall(b"".join([*pipelined, events, request("GET", "/health"), pipelined[0]]))
        together = [json.loads(sock.answer()[2])["choices"] for _ in seeds]
        stream = sock.answer()[2]
        assert sock.answer()[2] == b"ok"
        again = json.loads(sock.answer()[2])["choices"]
    assert together == alone
    assert again == alone[0]
    assert stream.count(b"data: ") == 4
    assert stream.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE"])
def test_other_methods_are_refused_by_name(service: Served, method: str) -> None:
    with Connection(service) as sock:
        for path, allowed in (("/health", "GET"), ("/v1/completions", "POST"), ("/", "GET")):
            sock.sendall(request(method, path))
            status, headers, _ = sock.answer()
            assert status == 405
            assert allowed in headers["allow"].split(", ")


def test_an_answer_to_head_has_no_body_that_the_next_one_would_be_taken_for(
    service: Served,
) -> None:
    with Connection(service) as sock:
        for path, expected in (
            ("/health", 200),
            ("/", 200),
            ("/nowhere", 404),
            ("/v1/models", 405),
        ):
            sock.sendall(request("HEAD", path))
            status, headers, _ = sock.answer("HEAD")
            assert status == expected
            assert int(headers["content-length"]) > 0


# Logs.


def test_logs_tell_neither_keys_nor_prompts(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """What was asked shows, by method, path and status; whatever went wrong with it."""
    key, wrong, secret = "open-sesame-4711", "open-sesamf-4712", "mellon"
    named: dict[str, Any] = {secret: 1}
    caplog.set_level(logging.DEBUG)
    with served(engine, api_key=key) as service:
        for given in (key, wrong):
            bearer = f"Authorization: Bearer {given}"

            def post(path: str, bearer: str = bearer, **body: Any) -> int:
                data = json.dumps({"model": MODEL, **body}).encode()
                return ask(service, request("POST", path, data, JSON, bearer))[0]

            statuses = [
                post("/v1/completions", prompt=secret, max_tokens=2),
                post("/v1/completions", prompt=secret, max_tokens=2, echo=True, stop=secret),
                post("/v1/completions", prompt=secret, max_tokens=2, user=secret, stream=True),
                post("/v1/completions", prompt=secret * 100),
                post("/v1/completions", prompt={"text": secret}),
                post("/v1/completions", prompt=secret, stop=[secret, ""]),
                post("/v1/completions", prompt=secret, **named),
                post("/v1/chat/completions", messages=[{"role": "user", "content": secret}]),
                post("/v1/chat/completions", messages=[{"role": secret, "content": secret}]),
                post("/v1/chat/completions", messages=secret),
            ]
            fine = [200, 200, 200, 400, 400, 400, 400, 200, 400, 400]
            assert statuses == (fine if given == key else [401] * len(fine))
            with service.client(api_key=given) as client:
                calls = [
                    partial(client.generate, secret, max_tokens=2),
                    partial(client.generate, secret * 100),
                    partial(client.generate, secret, stop=secret, max_tokens=2),
                ]
                for call in calls:
                    with suppress(CqilError) if given == key else pytest.raises(Unauthenticated):
                        call()
    assert "POST '/v1/completions' 200" in caplog.text
    assert "POST '/v1/chat/completions' 401" in caplog.text
    for told in (key, wrong, secret):
        assert told not in caplog.text
