"""The HTTP port's answers to requests that are odd, wrong, or meant to harm it."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from helpers.raw_http import CHUNKED, JSON, Connection, ask, completion, posted, request
from helpers.served import MODEL, Served, served

from cqil_dist.engine.engine import Engine
from cqil_dist.errors import CqilError, Unauthenticated

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
    """curl sends application/x-www-form-urlencoded unless it is told otherwise."""
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
    """Headers of more than 64 KiB are refused while they come."""
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
    """The requests are sent all at once, and one of them is for a stream."""
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
    """Whatever goes wrong with a request, its method, path and status are all that is logged."""
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
