"""The HTTP port's limits on clients that are slow or send too much."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, suppress

import httpx
import pytest
from helpers.raw_http import CHUNKED, JSON, MAX_BODY, Connection, ask, completion, posted, request
from helpers.served import MODEL, Served, served

from cqil_dist.engine.engine import Engine
from cqil_dist.serving import http_server

DRIBBLE_S = 0.05


def dribbled(service: Served, data: bytes, seconds: float) -> tuple[float, bytes]:
    """Send a byte now and then until the service hangs up; the seconds until then, its answer."""
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
    """Headers and body are sent at once; with Nagle's algorithm the body would wait 40 ms."""
    times: list[float] = []
    with Connection(service) as sock:
        for _ in range(20):
            began = time.monotonic()
            sock.sendall(request("GET", "/health"))
            assert sock.answer()[0] == 200
            times.append(time.monotonic() - began)
    # The first may be acknowledged at once, and others be late on a busy machine.
    assert sorted(times)[4] < 0.03


def test_headers_must_come_in_time(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are served meanwhile, also one whose headers are slow but not too slow."""
    monkeypatch.setattr(http_server, "_HEADERS_S", 2.0)
    slow = request("GET", "/health", b"", "X-Slow: " + "x" * 1000)
    with Connection(service, timeout_s=10) as silent:
        seconds, words = dribbled(service, slow, 10)
        assert seconds > 1.9
        assert words == b""
        assert silent.closes()
    with Connection(service, timeout_s=10) as patient:
        for part in (slow[:20], slow[20:]):
            patient.sendall(part)
            time.sleep(0.3)
        assert patient.answer()[0] == 200
        # An idle connection may stay, but not one that has begun another request.
        time.sleep(2.2)
        patient.sendall(request("GET", "/health"))
        assert patient.answer()[0] == 200
        patient.sendall(slow[:20])
        assert patient.closes()


@pytest.mark.parametrize("kind", [f"Content-Length: {MAX_BODY}", CHUNKED])
def test_bodies_must_come_in_time(
    engine: Engine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that comes too slowly or not at all is refused, and its rest is not read for long."""
    monkeypatch.setattr(http_server, "_HEADERS_S", 1.5)
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
    """Some connections have sent nothing, some half a request, and some have been answered."""
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
    """The rest of the body may still come, and then the next request."""
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
    """That also holds if the request has been answered already."""
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
    """Usual clients send the whole request before they read."""
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
    """To report each of a megabyte of mistakes would take some 20 s, in which all others wait."""
    with served(engine) as service:
        began = time.monotonic()
        body = f'{{"model": "{MODEL}", {mistakes}}}'.encode()
        status, error = ask(service, posted(body))
        assert time.monotonic() - began < 5
    assert status == 400
    assert len(error["error"]["message"]) < 1000
