"""`cqil bench serve` against a small server whose tokens, pauses and faults are known."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from tls import self_signed
from typer.testing import CliRunner

from cqil_dist.benchmarks.serve import prompts
from cqil_dist.benchmarks.serve.answer import Answer, read
from cqil_dist.benchmarks.serve.arrivals import arrivals
from cqil_dist.benchmarks.serve.measure import Load, Measurement, measure
from cqil_dist.benchmarks.serve.peer import Peer
from cqil_dist.benchmarks.serve.recording import Recording
from cqil_dist.benchmarks.serve.request_form import Endpoint
from cqil_dist.benchmarks.serve.run import RunResult
from cqil_dist.benchmarks.serve.summary import report, results
from cqil_dist.cli.bench import app
from cqil_dist.errors import (
    CqilError,
    ModelNotFound,
    RequestError,
    ServiceError,
    ServiceUnavailable,
    Unauthenticated,
)
from cqil_dist.progress import SilentProgress
from cqil_dist.serving.serve_config import Tls

PROMPT_TOKENS = 7
SCRIPT = Path(__file__).parents[2] / "bench" / "serve.py"


@dataclass
class Server:
    """How the server behaves, and what it saw.

    Attributes:
        tokens: of every answer; `per_event` of them in one event.
        pause_s: before each event.
        faults: by the number of the request (the first one is the client's question how to ask):
            "429", "drop" (hangs up midway), "cut" (ends midway in good order), "error" (an event).
        refuses: fields of a request that it does not take.
        bodies: of the requests.
        peak: most requests at once.
    """

    tokens: int = 6
    per_event: int = 1
    pause_s: float = 0.002
    usage: bool = True
    models: tuple[str, ...] | None = ("tiny",)
    api_key: str | None = None
    faults: dict[int, str] = field(default_factory=dict)
    refuses: tuple[str, ...] = ()
    bodies: list[dict[str, Any]] = field(default_factory=list)
    under_way: int = 0
    peak: int = 0
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            if self._stranger(request):
                return error(401, "a key is needed")
            if self.models is None:
                return error(404, "Not Found")
            data = [{"id": name, "owned_by": "a test"} for name in self.models]
            return JSONResponse({"data": data})

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            return await self._answer(request, chat=False)

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            return await self._answer(request, chat=True)

        return app

    def _stranger(self, request: Request) -> bool:
        key = f"Bearer {self.api_key}"
        return self.api_key is not None and request.headers.get("authorization") != key

    async def _answer(self, request: Request, chat: bool) -> Response:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        if self._stranger(request):
            return error(401, "a key is needed")
        if body["model"] not in (self.models or ("tiny",)):
            return error(404, f"no model {body['model']}")
        if unknown := [name for name in self.refuses if name in body]:
            return error(400, f"unknown field {unknown[0]}")
        fault = self.faults.get(number)
        if fault == "429":
            return error(429, "too many")
        return StreamingResponse(
            self._stream(body, fault, chat), media_type="text/event-stream; charset=utf-8"
        )

    async def _stream(self, body: dict[str, Any], fault: str | None, chat: bool) -> Any:
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        try:
            async for data in self._events(body, fault, chat):
                yield f"data: {data}\r\n\r\n"
        finally:
            self.under_way -= 1

    async def _events(
        self, body: dict[str, Any], fault: str | None, chat: bool
    ) -> AsyncIterator[str]:
        if chat:  # an opening that brings no text
            yield event(delta={"role": "assistant", "content": ""})
        for first in range(0, self.tokens, self.per_event):
            await asyncio.sleep(self.pause_s)
            if fault is not None and first >= self.tokens // 2:
                if fault == "drop":
                    raise ConnectionAbortedError
                if fault == "error":
                    yield json.dumps({"error": {"message": "out of memory", "code": 500}})
                return
            text = "x" * min(self.per_event, self.tokens - first)
            yield event(delta={"content": text}) if chat else event(text=text)
        ending: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        yield event(finish_reason="length", **ending)
        if self.usage and body.get("stream_options", {}).get("include_usage"):
            counts = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": self.tokens}
            yield json.dumps({"choices": [], "usage": counts})
        yield "[DONE]"


def error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


def event(finish_reason: str | None = None, **choice: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "finish_reason": finish_reason, **choice}]})


@contextmanager
def serving(server: Server, tls: Tls | None = None) -> Iterator[Server]:
    """The server on a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = uvicorn.Config(
            server.app(),
            log_config=None,
            lifespan="off",
            ws="none",
            ssl_certfile=None if tls is None else str(tls.cert),
            ssl_keyfile=None if tls is None else str(tls.key),
        )
        http = uvicorn.Server(config)
        thread = threading.Thread(target=http.run, args=([sock],), daemon=True)
        thread.start()
        server.url = f"{'https' if tls else 'http'}://127.0.0.1:{sock.getsockname()[1]}"
        try:
            yield server
        finally:
            http.should_exit = True
            thread.join(timeout=10)


def measured(server: Server, **load: Any) -> Measurement:
    asked = Load(**{"num_prompts": 6, "num_warmups": 0, "timeout_s": 30, **load})
    return measure(Peer(server.url, server.api_key), asked, SilentProgress())


def answers_of(found: Measurement) -> list[Answer]:
    return [answer for run in found.runs for answer in run.answers]


# What is counted.


@pytest.mark.parametrize("endpoint", list(Endpoint))
def test_tokens_are_counted_from_usage_and_times_from_events(endpoint: Endpoint) -> None:
    with serving(Server(pause_s=0.01)) as server:
        found = measured(server, endpoint=endpoint)
    for answer in answers_of(found):
        assert answer.failure is None
        assert answer.output_tokens == len(answer.text_s) == server.tokens
        assert answer.prompt_tokens == PROMPT_TOKENS
        assert answer.tpot_ms is not None
        assert answer.due_s <= answer.sent_s < answer.text_s[0]
        assert all(before <= after for before, after in pairwise(answer.text_s))
        assert answer.text_s[-1] <= answer.ended_s
        assert 10 <= answer.ttft_ms <= answer.e2el_ms  # an opening without text is no token
        assert answer.ttft_ms + sum(answer.itl_ms) <= answer.e2el_ms
        assert np.mean(answer.itl_ms) == pytest.approx(answer.tpot_ms)
    (result,) = results(found.runs, [50], paced=False)
    assert result["completed"] == 6
    assert result["total_output_tokens"] == 6 * server.tokens
    assert result["total_input_tokens"] == 6 * PROMPT_TOKENS
    assert result["output_tokens_from"] == "usage"
    assert result["request_throughput"] * result["duration"] == pytest.approx(6)
    assert result["output_throughput"] < result["total_token_throughput"]


def test_without_usage_events_are_counted_and_prompts_are_not() -> None:
    with serving(Server(usage=False)) as server:
        found = measured(server)
    (result,) = results(found.runs, [50], paced=False)
    assert result["output_tokens_from"] == "events"
    assert result["total_output_tokens"] == 6 * server.tokens
    assert result["total_input_tokens"] is None
    assert result["total_token_throughput"] is None


def test_an_event_with_several_tokens_counts_as_several() -> None:
    with serving(Server(tokens=7, per_event=3)) as server:
        found = measured(server)
    assert {answer.output_tokens for answer in answers_of(found)} == {7}
    assert {len(answer.itl_ms) for answer in answers_of(found)} == {2}
    (result,) = results(found.runs, [50], paced=False)
    assert result["output_tokens_per_event"] == pytest.approx(7 / 3)


def test_failures_are_counted_by_kind_and_the_others_go_on() -> None:
    faults = {1: "429", 2: "drop", 3: "error", 4: "cut", 5: "429"}
    with serving(Server(faults=faults)) as server:
        found = measured(server, num_prompts=10, max_concurrency=(2,))
    (result,) = results(found.runs, [50], paced=False)
    assert (result["completed"], result["failed"]) == (5, 5)
    kinds = ("HTTP 429: too many", "midway: ", "out of memory", "neither a finish_reason")
    counts = {
        kind: sum(count for message, count in result["failures"].items() if kind in message)
        for kind in kinds
    }
    assert list(counts.values()) == [2, 1, 1, 1]
    assert result["total_output_tokens"] == 5 * server.tokens


def test_an_answer_that_takes_too_long_is_a_failure() -> None:
    with serving(Server(tokens=1000, pause_s=0.05)) as server:
        found = measured(server, num_prompts=2, timeout_s=0.3)
    messages = {answer.failure for answer in answers_of(found)}
    assert messages == {"midway: no whole answer within 0.3 s"}
    (result,) = results(found.runs, [50], paced=False)
    assert result["completed"] == 0
    assert result["mean_ttft_ms"] is None


# How requests are sent.


def test_no_more_requests_are_under_way_than_may_be() -> None:
    with serving(Server(pause_s=0.01)) as server:
        found = measured(server, num_prompts=12, max_concurrency=(3,))
    assert server.peak == 3
    assert found.runs[0].peak == 3
    with serving(Server(pause_s=0.02)) as server:
        found = measured(server, num_prompts=12)
    assert found.runs[0].peak == 12
    assert server.peak > 3


def test_concurrencies_take_turns_and_ask_the_same() -> None:
    with serving(Server()) as server:
        found = measured(server, num_prompts=4, max_concurrency=(1, 2), repeats=2)
    assert [run.max_concurrency for run in found.runs] == [1, 2, 1, 2]
    asked = [body["prompt"] for body in server.bodies[1:]]
    rounds = [sorted(asked[start : start + 4]) for start in range(0, 16, 4)]
    assert all(texts == sorted(prompts.chosen(4, seed=0)) for texts in rounds)
    entries = results(found.runs, [50], paced=False)
    assert [entry["max_concurrency"] for entry in entries] == [1, 2]
    assert [entry["completed"] for entry in entries] == [8, 8]
    assert [len(entry["repeats"]) for entry in entries] == [2, 2]


def test_warm_ups_are_not_counted() -> None:
    with serving(Server()) as server:
        found = measured(server, num_warmups=3)
    assert len(answers_of(found)) == 6
    assert len(server.bodies) == 1 + 3 + 6


def test_waiting_for_room_counts_as_queueing_and_not_as_latency() -> None:
    with serving(Server(pause_s=0.02)) as server:  # 120 ms an answer, one due every 10 ms
        found = measured(server, request_rate=100, max_concurrency=(1,))
    in_order = sorted(answers_of(found), key=lambda answer: answer.due_s)
    assert all(answer.sent_s >= answer.due_s for answer in in_order)
    for before, after in pairwise(in_order):
        assert after.sent_s >= before.ended_s
    assert in_order[-1].queueing_ms > in_order[-1].ttft_ms
    (result,) = results(found.runs, [50], paced=True)
    assert result["mean_queueing_ms"] == pytest.approx(
        np.mean([answer.queueing_ms for answer in in_order])
    )
    assert "mean_queueing_ms" not in results(found.runs, [50], paced=False)[0]


def test_arrivals_follow_from_the_seed_and_have_the_right_mean() -> None:
    moments = arrivals(4000, rate=5, burstiness=1, seed=1)
    assert moments == arrivals(4000, rate=5, burstiness=1, seed=1)
    assert moments != arrivals(4000, rate=5, burstiness=1, seed=2)
    assert moments[0] == 0
    assert moments == sorted(moments)
    assert np.mean(np.diff(moments)) == pytest.approx(1 / 5, rel=0.05)
    assert 2 * np.array(arrivals(50, 10, 1, seed=3)) == pytest.approx(arrivals(50, 5, 1, seed=3))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float) -> None:
    gaps = np.diff(arrivals(20_000, rate=2, burstiness=burstiness, seed=0))
    assert gaps.mean() == pytest.approx(1 / 2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.1)


def test_an_infinite_rate_makes_all_due_at_once() -> None:
    assert arrivals(3, float("inf"), 1, seed=0) == [0, 0, 0]


def test_prompts_are_the_whole_set_again_and_again() -> None:
    size = len(prompts.PROMPTS)
    assert size == len(set(prompts.PROMPTS))
    texts = prompts.chosen(2 * size + 3, seed=5)
    assert texts == prompts.chosen(2 * size + 3, seed=5)
    assert set(texts[:size]) == set(texts[size : 2 * size]) == set(prompts.PROMPTS)
    assert texts[:size] != texts[size : 2 * size]


def test_unique_prompts_never_come_again() -> None:
    with serving(Server()) as server:
        measured(server, num_prompts=30, num_warmups=2, repeats=2, unique_prompts=True)
    asked = [body["prompt"] for body in server.bodies]
    assert len(set(asked)) == len(asked)


# What is made of it.


def answer_at(due_s: float, sent_s: float, text_s: list[float], tokens: int | None) -> Answer:
    return Answer(due_s, sent_s, text_s[-1] + 0.5, 200, tuple(text_s), 3, tokens, failure=None)


def test_figures_are_those_of_numpy() -> None:
    draw = np.random.default_rng(0)
    answers = [
        answer_at(0.0, sent, (sent + np.cumsum(draw.exponential(size=9))).tolist(), 18)
        for sent in draw.uniform(0, 5, size=40).tolist()
    ]
    runs = [RunResult(4, 10.0, 4, tuple(answers[:25]), None)]
    runs += [RunResult(4, 6.0, 3, tuple(answers[25:]), None)]
    (result,) = results(runs, [5, 50, 99.9], paced=True)
    expected: dict[str, Any] = {
        "ttft": [1000 * (each.text_s[0] - each.sent_s) for each in answers],
        "tpot": [1000 * (each.text_s[-1] - each.text_s[0]) / 17 for each in answers],
        "itl": np.concatenate([1000 * np.diff(each.text_s) for each in answers]),
        "e2el": [1000 * (each.ended_s - each.sent_s) for each in answers],
        "queueing": [1000 * each.sent_s for each in answers],
    }
    for name, values in expected.items():
        assert result[f"mean_{name}_ms"] == pytest.approx(np.mean(values))
        assert result[f"median_{name}_ms"] == pytest.approx(np.median(values))
        assert result[f"std_{name}_ms"] == pytest.approx(np.std(values))
        for percent in (5, 50, 99.9):
            key = f"p{percent:g}_{name}_ms"
            assert result[key] == pytest.approx(np.percentile(values, percent))
    assert result["duration"] == 16
    assert result["output_throughput"] == 40 * 18 / 16
    assert result["total_token_throughput"] == 40 * (18 + 3) / 16
    assert result["max_concurrent_requests"] == 4


STREAM = (
    b": a comment\n\n"
    b'data: {"choices":[{"delta":{"role":"assistant","content":null}}]}\r\n\r\n'
    b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n'
    b'event: message\ndata: {"choices":[{"delta":{"content":"a\xc3\xa9"}}],"usage":null}\n\n'
    b'data:{"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}\n\n'
    b"data: [DONE]"
)


@given(st.sets(st.integers(1, len(STREAM) - 1)))
def test_where_the_network_cuts_a_stream_changes_nothing_but_times(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [
        (float(end), STREAM[start:end]) for start, end in pairwise(edges)
    ]  # each piece comes at its end, so that an event is there no earlier than its last byte
    recording = Recording(0.0, 0.0, 1000.0, 200, "text/event-stream", pieces)
    answer = read(recording)
    assert answer.failure is None
    assert (answer.prompt_tokens, answer.completion_tokens) == (2, 3)
    ends = [STREAM.index(b"\n", STREAM.index(text)) for text in (b"hm", b"a\xc3\xa9")]
    assert len(answer.text_s) == 2
    assert all(at > end for at, end in zip(answer.text_s, ends, strict=True))


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (500, b"Internal\nServer Error", "HTTP 500: Internal Server Error"),
        (422, b'{"detail":[{"loc":["body"],"msg":"no"}]}', "HTTP 422"),
        (400, b'{"error":"bad"}', "HTTP 400: bad"),
        (503, b"", "HTTP 503"),
        (200, b'{"choices":[{"text":"whole"}]}', "no events in an answer of type text/plain"),
        (200, b"data: {oops\n\n", "an event is not of the OpenAI API"),
        (200, b"data: [1, 2]\n\n", "an event is not of the OpenAI API"),
        (200, b"data: [DONE]\n\n", "no text: the model ended at once"),
    ],
)
def test_whatever_comes_back_is_told_in_a_line(status: int, body: bytes, told: str) -> None:
    answer = read(Recording(0.0, 0.0, 1.0, status, "text/plain", [(0.5, body)]))
    assert answer.failure is not None
    assert answer.failure.startswith(told)
    assert "\n" not in answer.failure


# How peers differ, and what cannot be measured.


def test_fields_that_a_peer_refuses_are_left_out() -> None:
    with serving(Server(refuses=("ignore_eos",))) as server:
        load = Load(num_prompts=2, num_warmups=0, ignore_eos=True)
        peer = Peer(server.url)
        found = measure(peer, load, SilentProgress())
        setting = report(peer, load, found, [50], {})["setting"]
    assert setting["ignore_eos_refused"]
    assert not setting["ignore_eos"]
    assert not setting["include_usage_refused"]
    assert {answer.failure for answer in answers_of(found)} == {None}
    with serving(Server(refuses=("ignore_eos", "stream_options"))) as server:
        found = measured(server, ignore_eos=True)
    assert found.form is not None
    assert not found.form.include_usage
    assert {answer.output_tokens for answer in answers_of(found)} == {server.tokens}


def test_a_peer_that_is_busy_at_first_is_measured_all_the_same() -> None:
    with serving(Server(faults={0: "429"})) as server:
        found = measured(server, ignore_eos=True)
    assert found.form is not None
    assert found.form.ignore_eos
    assert {answer.failure for answer in answers_of(found)} == {None}


def test_a_request_that_is_refused_in_any_form_is_an_error() -> None:
    with (
        serving(Server(refuses=("max_tokens",))) as server,
        pytest.raises(RequestError, match=r"HTTP 400: unknown field max_tokens.*tiny"),
    ):
        measured(server)


def test_nobody_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(ServiceUnavailable, match=f"nobody answers at http://127.0.0.1:{port}"):
        measured(Server(url=f"http://127.0.0.1:{port}"))


def test_a_key_that_is_missing_or_wrong() -> None:
    with serving(Server(api_key="right")) as server:
        with pytest.raises(Unauthenticated, match=r"asks for a key.*--api-key"):
            measured(replace(server, api_key=None))
        with pytest.raises(Unauthenticated, match="does not accept the key"):
            measured(replace(server, api_key="wrong"))
        assert len(answers_of(measured(server))) == 6


def test_a_model_that_is_not_there() -> None:
    with (
        serving(Server()) as server,
        pytest.raises(ModelNotFound, match=r"'huge' is not listed.*--model.*tiny"),
    ):
        measured(server, model="huge")


def test_without_a_list_of_models_one_has_to_be_named() -> None:
    with serving(Server(models=None)) as server:
        with pytest.raises(ServiceError, match="--model"):
            measured(server)
        assert len(answers_of(measured(server, model="tiny"))) == 6


def test_the_address_may_end_in_v1() -> None:
    with serving(Server()) as server:
        assert len(answers_of(measured(replace(server, url=f"{server.url}/v1/")))) == 6


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://x", "http://"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(CqilError, match="http://HOST:PORT"):
        Peer(address)


def test_a_certificate_is_believed_by_its_authority_or_not_looked_at(tmp_path: Path) -> None:
    tls = self_signed(tmp_path)
    load = Load(num_prompts=2, num_warmups=0)
    with serving(Server(), tls) as server:
        with pytest.raises(ServiceUnavailable, match=r"not believed.*--ca-cert.*--insecure"):
            measure(Peer(server.url), load, SilentProgress())
        for peer in (Peer(server.url, ca_cert=tls.cert), Peer(server.url, insecure=True)):
            found = measure(peer, load, SilentProgress())
            assert [answer.failure for answer in answers_of(found)] == [None, None]


def test_certificates_that_cannot_be_read(tmp_path: Path) -> None:
    for ca_cert in (tmp_path / "absent.pem", Path(__file__)):
        peer = Peer("https://127.0.0.1:1", ca_cert=ca_cert)
        with pytest.raises(CqilError, match="cannot read certificates"):
            measure(peer, Load(), SilentProgress())


@pytest.mark.parametrize(
    "values",
    [
        {"num_prompts": 0},
        {"max_concurrency": (4, 0)},
        {"request_rate": 0.0},
        {"burstiness": float("nan")},
        {"num_warmups": -1},
    ],
)
def test_values_out_of_range(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(CqilError, match=name):
        Load(**values)


# The command.


def test_the_command_prints_tables_and_writes_json(tmp_path: Path) -> None:
    with serving(Server(api_key="a-secret", faults={3: "429"})) as server:
        result = CliRunner().invoke(
            app,
            [
                *("serve", "--base-url", f"{server.url}/v1"),
                *("--max-concurrency", "1,2", "--max-concurrency", "3", "--num-prompts", "5"),
                *("--num-warmups", "0", "--percentiles", "25,99.9", "--request-rate", "500"),
                *("--repeats", "2", "-o", str(tmp_path)),
            ],
            env={"CQIL_API_KEY": "a-secret", "COLUMNS": "120"},
        )
    assert result.exit_code == 0, result.output
    for expected in ("Throughput", "Latency, ms", "TTFT", "p99.9", "queueing", "HTTP 429"):
        assert expected in result.output
    text = (tmp_path / "serve.json").read_text()
    assert "a-secret" not in text
    written = json.loads(text, parse_constant=pytest.fail)
    assert written["setting"]["base_url"] == server.url
    assert written["setting"]["model"] == "tiny"
    assert written["setting"]["served_by"] == "a test"
    assert written["setting"]["prompts"]["hash"] == prompts.content_hash()
    assert [entry["max_concurrency"] for entry in written["results"]] == [1, 2, 3]
    assert sum(entry["failed"] for entry in written["results"]) == 1
    assert 0 < written["client_attention"]["busy_share"] <= 1
    assert not written["interrupted"]


def test_a_password_in_the_address_is_not_shown() -> None:
    assert Peer("http://user:secret@host:1/v1?token=x").shown == "http://host:1"
    assert Peer("https://host/prefix/v1/").shown == "https://host/prefix"


@pytest.mark.parametrize(
    "option", [("--percentiles", "50,x"), ("--percentiles", "101"), ("--max-concurrency", "1;2")]
)
def test_lists_that_are_none(option: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["serve", *option])
    assert result.exit_code == 2
    assert option[0] in result.output


def test_a_run_without_any_answer_fails(tmp_path: Path) -> None:
    faults = dict.fromkeys(range(1, 10), "429")
    with serving(Server(faults=faults)) as server:
        options = ["--base-url", server.url, "--num-prompts", "2", "--num-warmups", "0"]
        result = CliRunner().invoke(app, ["serve", *options, "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert "HTTP 429: too many" in result.output


def test_ctrl_c_reports_what_there_is(tmp_path: Path) -> None:
    with serving(Server(tokens=20, pause_s=0.01)) as server:
        process = subprocess.Popen(
            [
                *(sys.executable, str(SCRIPT)),
                *("--base-url", server.url, "--num-prompts", "1000", "--max-concurrency", "2"),
                *("--num-warmups", "0", "-o", str(tmp_path)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            deadline = time.monotonic() + 60
            while len(server.bodies) < 8 and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, output
    assert "Interrupted" in output
    written = json.loads((tmp_path / "serve.json").read_text())
    assert written["interrupted"]
    assert 0 < written["results"][0]["completed"] < 1000
    assert written["results"][0]["failed"] == 0


def test_the_command_line_starts_without_an_http_client() -> None:
    code = "import sys, cqil_dist.cli.bench; print('httpx' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
