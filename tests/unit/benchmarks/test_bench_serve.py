"""`cqil bench serve` against a small server whose tokens, pauses and faults are known."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.openai_like_server import PROMPT_TOKENS, Behave, Server, serving
from helpers.tls import self_signed
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from cqil_dist.benchmarks.serve import prompts
from cqil_dist.benchmarks.serve.load import Endpoint, Load
from cqil_dist.benchmarks.serve.measure import Measurement, measure
from cqil_dist.benchmarks.serve.run import Run, arrivals
from cqil_dist.benchmarks.serve.stream import Answer, Recording, read
from cqil_dist.benchmarks.serve.summary import report, results
from cqil_dist.benchmarks.serve.tables import notes
from cqil_dist.benchmarks.serve.target import Target
from cqil_dist.cli.bench import app
from cqil_dist.errors import CqilError, RequestError, ServiceUnavailable, Unauthenticated
from cqil_dist.progress import SilentProgress


@pytest.fixture(scope="module")
def behave() -> Iterator[Behave]:
    with serving() as behave:
        yield behave


def measured(target: Server | Target, **load: Any) -> Measurement:
    if isinstance(target, Server):
        target = Target(target.url, target.api_key)
    asked = Load(**{"num_prompts": 6, "num_warmups": 0, "timeout_s": 30, **load})
    return measure(target, asked, SilentProgress())


def answers_of(found: Measurement) -> list[Answer]:
    return [answer for run in found.runs for answer in run.answers]


# Counts.


@pytest.mark.parametrize("endpoint", list(Endpoint))
def test_tokens_come_from_usage_and_times_from_events(behave: Behave, endpoint: Endpoint) -> None:
    server = behave(pause_s=0.01)
    found = measured(server, endpoint=endpoint)
    for answer in answers_of(found):
        assert answer.output_tokens == len(answer.text_s) == server.tokens
        moments = [answer.due_s, answer.sent_s, *answer.text_s, answer.ended_s]
        assert moments == sorted(moments)
        assert 10 <= answer.ttft_ms <= answer.e2el_ms  # a first event without text is no token
        assert np.mean(answer.itl_ms) == pytest.approx(answer.tpot_ms)
    (result,) = results(found.runs, paced=False)
    assert result["completed"] == 6
    assert result["total_output_tokens"] == 6 * server.tokens
    assert result["total_input_tokens"] == 6 * PROMPT_TOKENS
    assert result["output_tokens_from"] == "usage"


@pytest.mark.parametrize("asked", [True, False])
def test_without_usage_events_are_counted_and_prompts_are_not(behave: Behave, asked: bool) -> None:
    server = behave(usage=not asked)  # not given, or not asked for
    found = measured(server, usage=asked)
    assert all(("stream_options" in body) == asked for body in server.bodies)
    (result,) = results(found.runs, paced=False)
    assert result["output_tokens_from"] == "events"
    assert result["total_output_tokens"] == 6 * server.tokens
    assert result["total_input_tokens"] is result["total_token_throughput"] is None


def test_an_event_with_several_tokens_counts_as_several(behave: Behave) -> None:
    found = measured(behave(tokens=7, per_event=3))
    assert {answer.output_tokens for answer in answers_of(found)} == {7}
    assert {len(answer.itl_ms) for answer in answers_of(found)} == {2}
    (result,) = results(found.runs, paced=False)
    assert result["output_tokens_per_event"] == pytest.approx(7 / 3)


def test_failures_are_counted_by_kind_and_the_others_go_on(behave: Behave) -> None:
    server = behave(faults={1: "429", 2: "drop", 3: "error", 4: "cut", 5: "429"})
    found = measured(server, num_prompts=10, max_concurrency=(2,))
    (result,) = results(found.runs, paced=False)
    assert (result["completed"], result["failed"]) == (5, 5)
    kinds = ("HTTP 429: too many", "midway: ", "out of memory", "neither a finish_reason")
    counts = [sum(n for told, n in result["failures"].items() if kind in told) for kind in kinds]
    assert counts == [2, 1, 1, 1]
    assert result["total_output_tokens"] == 5 * server.tokens


def test_an_answer_that_takes_too_long_is_a_failure(behave: Behave) -> None:
    found = measured(behave(tokens=1000, pause_s=0.05), num_prompts=2, timeout_s=1.0)
    (result,) = results(found.runs, paced=False)
    assert result["failures"] == {"midway: no whole answer within 1 s": 2}
    assert result["mean_ttft_ms"] is None


# Sending requests.


@pytest.mark.parametrize(("bound", "peak"), [(3, 3), (None, 12)])
def test_requests_under_way_are_bounded(behave: Behave, bound: int | None, peak: int) -> None:
    # Without a limit, the last request has to start before the first ends.
    server = behave(pause_s=0.02 if bound else 0.2)
    found = measured(server, num_prompts=12, max_concurrency=(bound,))
    assert found.runs[0].peak == server.peak == peak


def test_concurrencies_take_turns_and_ask_the_same(behave: Behave) -> None:
    server = behave()
    found = measured(server, num_prompts=4, max_concurrency=(1, 2), repeats=2, num_warmups=3)
    assert [run.max_concurrency for run in found.runs] == [1, 2, 1, 2]
    probe_and_warmups = 1 + 3
    asked = [body["prompt"] for body in server.bodies[probe_and_warmups:]]
    rounds = [sorted(asked[start : start + 4]) for start in range(0, 16, 4)]
    assert rounds == 4 * [sorted(prompts.chosen(4, seed=0))]
    entries = results(found.runs, paced=False)
    assert [entry["max_concurrency"] for entry in entries] == [1, 2]
    assert [entry["completed"] for entry in entries] == [8, 8]
    assert [len(entry["repeats"]) for entry in entries] == [2, 2]


def test_waiting_for_room_counts_as_queueing_and_not_as_latency(behave: Behave) -> None:
    # 60 ms an answer, one due every 5 ms.
    found = measured(behave(pause_s=0.01), request_rate=200, max_concurrency=(1,))
    in_order = sorted(answers_of(found), key=lambda answer: answer.due_s)
    assert all(answer.sent_s >= answer.due_s for answer in in_order)
    for before, after in pairwise(in_order):
        assert after.sent_s >= before.ended_s
    assert in_order[-1].queueing_ms > in_order[-1].ttft_ms
    (result,) = results(found.runs, paced=True)
    queueing_ms = [1000 * (answer.sent_s - answer.due_s) for answer in in_order]
    assert result["mean_queueing_ms"] == pytest.approx(np.mean(queueing_ms))
    assert "mean_queueing_ms" not in results(found.runs, paced=False)[0]


def test_arrivals_follow_from_the_seed() -> None:
    moments = arrivals(4000, rate=5, burstiness=1, seed=1)
    assert moments == arrivals(4000, rate=5, burstiness=1, seed=1)
    assert moments != arrivals(4000, rate=5, burstiness=1, seed=2)
    assert moments[0] == 0
    assert 2 * np.array(arrivals(50, 10, 1, seed=3)) == pytest.approx(arrivals(50, 5, 1, seed=3))
    assert arrivals(3, float("inf"), 1, seed=0) == [0, 0, 0]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_right_mean_and_burstiness(burstiness: float) -> None:
    gaps = np.diff(arrivals(20_000, rate=2, burstiness=burstiness, seed=0))
    assert gaps.mean() == pytest.approx(1 / 2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.1)


def test_prompts_are_the_whole_set_again_and_again() -> None:
    size = len(prompts.PROMPTS)
    assert size == len(set(prompts.PROMPTS))
    texts = prompts.chosen(2 * size + 3, seed=5)
    assert texts == prompts.chosen(len(texts), seed=5)
    assert set(texts[:size]) == set(texts[size : 2 * size]) == set(prompts.PROMPTS)
    assert texts[:size] != texts[size : 2 * size]


def test_unique_prompts_never_come_again(behave: Behave) -> None:
    server = behave()
    measured(server, num_prompts=30, num_warmups=2, repeats=2, unique_prompts=True)
    asked = [body["prompt"] for body in server.bodies]
    assert len(set(asked)) == len(asked) == 1 + 2 + 2 * 30


# Figures.


def test_figures_follow_their_definitions() -> None:
    first = Answer(0.0, 1.0, 4.0, [2.0, 3.0, 3.5], {"prompt_tokens": 3, "completion_tokens": 7})
    second = Answer(0.0, 0.0, 6.0, [3.0, 5.0], {"prompt_tokens": 4, "completion_tokens": 3})
    (result,) = results([Run(4, 10.0, 0.1, 4, [first]), Run(4, 6.0, 0.2, 3, [second])], paced=True)
    seconds = {"ttft": (1, 3), "tpot": (0.25, 1), "itl": (1, 0.5, 2), "e2el": (3, 6)}
    seconds["queueing"] = (1, 0)
    for name, values in seconds.items():
        figures = {"mean": np.mean(values), "std": np.std(values), "median": np.median(values)}
        figures |= {f"p{percent}": np.percentile(values, percent) for percent in (50, 90, 99)}
        assert {k: result[f"{k}_{name}_ms"] / 1000 for k in figures} == pytest.approx(figures)
    assert result["duration"] == 16
    assert result["output_throughput"] == (7 + 3) / 16
    assert result["total_token_throughput"] == (7 + 3 + 3 + 4) / 16
    assert result["max_concurrent_requests"] == 4
    assert [each["client_cpu_share"] for each in result["repeats"]] == [0.1, 0.2]


@pytest.mark.parametrize(("share", "warned"), [(0.4, False), (0.6, True)])
def test_a_client_that_is_itself_busy_is_said_to_be(share: float, warned: bool) -> None:
    run = Run(None, 1.0, share, 1, [Answer(0.0, 0.0, 1.0, [0.5])])
    found = report(Target("http://host"), Load(), Measurement(model="tiny", runs=[run]), {})
    assert found["client_cpu_share"] == share
    assert any("may be what was measured" in note for note in notes(found)) == warned


STREAM = (
    b": a comment\n\n"
    b'data: {"choices":[{"delta":{"role":"assistant","content":null}}]}\r\n\r\n'
    b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n'
    b'event: message\ndata: {"choices":[{"delta":{"content":"a\xc3\xa9"}}],"usage":null}\n\n'
    b'data:{"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3,"details":null}}\n\n'
    b"data: [DONE]"
)


@given(st.sets(st.integers(1, len(STREAM) - 1)))
def test_where_the_network_cuts_a_stream_changes_nothing_but_times(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    # A piece's time is the offset of its end: no event is complete before its last byte.
    pieces = [(float(end), STREAM[start:end]) for start, end in pairwise(edges)]
    answer = read(Recording(0.0, 0.0, 1000.0, 200, pieces))
    assert answer.failure is None
    assert answer.usage == {"prompt_tokens": 2, "completion_tokens": 3}
    ends = [STREAM.index(b"\n", STREAM.index(text)) for text in (b"hm", b"a\xc3\xa9")]
    assert len(answer.text_s) == 2
    assert all(at > end for at, end in zip(answer.text_s, ends, strict=True))


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (500, b"Internal\nServer Error", "HTTP 500: Internal Server Error"),
        (422, b'{"detail":[{"loc":["body"],"msg":"no"}]}', "HTTP 422: [{'loc'"),
        (400, b'{"error":"bad"}', "HTTP 400: bad"),
        (503, b"", "HTTP 503"),
        (200, b"<html>\nHello", "no events in the answer: <html> Hello"),
        (200, b"data: {oops\n\n", "an event is not of the OpenAI API"),
        (200, b"data: [1, 2]\n\n", "an event is not of the OpenAI API"),
        (200, b'data: {"usage": 7}\n\n', "an event is not of the OpenAI API"),
        (200, b"data: [DONE]\n\n", "no text: the model ended at once"),
    ],
)
def test_whatever_comes_back_is_told_in_a_line(status: int, body: bytes, told: str) -> None:
    answer = read(Recording(0.0, 0.0, 1.0, status, [(0.5, body)]))
    assert answer.failure is not None
    assert answer.failure.startswith(told)
    assert "\n" not in answer.failure


# Differences between servers, and what cannot be measured.


@pytest.mark.parametrize(
    ("field", "way_out"),
    [("ignore_eos", "leave out --ignore-eos"), ("stream_options", "--no-usage")],
)
def test_a_field_that_a_server_refuses(behave: Behave, field: str, way_out: str) -> None:
    server = behave(refuses=(field,))
    with pytest.raises(RequestError, match=f"HTTP 400: unknown field {field}.*{way_out}"):
        measured(server, ignore_eos=True)
    found = measured(server, ignore_eos=field != "ignore_eos", usage=field != "stream_options")
    assert {answer.failure for answer in answers_of(found)} == {None}


def test_a_server_that_is_busy_at_first_is_measured_all_the_same(behave: Behave) -> None:
    answers = answers_of(measured(behave(faults={0: "429"})))
    assert [answer.failure for answer in answers] == 6 * [None]


def test_nobody_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(ServiceUnavailable, match=f"cannot reach {url} .*--base-url"):
        measured(Target(url))


def test_a_key_that_is_missing_or_wrong(behave: Behave) -> None:
    server = behave(api_key="right")
    with pytest.raises(Unauthenticated, match=r"asks for a key.*--api-key"):
        measured(Target(server.url))
    with pytest.raises(Unauthenticated, match="does not accept the key"):
        measured(Target(server.url, "wrong"))
    assert len(answers_of(measured(server))) == 6


def test_a_model_that_is_not_there(behave: Behave) -> None:
    with pytest.raises(RequestError, match=r"no model huge.*lists no 'huge'.*--model.*tiny"):
        measured(behave(), model="huge")


def test_without_a_list_of_models_one_has_to_be_named(behave: Behave) -> None:
    server = behave(models=None)
    with pytest.raises(CqilError, match="lists no models: name one with --model"):
        measured(server)
    assert len(answers_of(measured(server, model="tiny"))) == 6


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:y"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(CqilError, match="must be http://HOST:PORT"):
        Target(address)


def test_a_password_in_the_address_is_not_shown() -> None:
    assert Target("http://user:secret@host:1/v1?token=x").shown == "http://host:1"
    assert Target("https://host/prefix/v1/").shown == "https://host/prefix"


def test_a_certificate_is_believed_by_its_authority_or_not_looked_at(tmp_path: Path) -> None:
    tls = self_signed(tmp_path)
    with serving(tls) as behave:
        url = behave().url
        with pytest.raises(ServiceUnavailable, match=r"--ca-cert.*--insecure"):
            measured(Target(url))
        for target in (Target(url, ca_cert=tls.cert), Target(url, insecure=True)):
            found = measured(target, num_prompts=2)
            assert [answer.failure for answer in answers_of(found)] == [None, None]


def test_certificates_that_cannot_be_read(tmp_path: Path) -> None:
    for ca_cert in (tmp_path / "absent.pem", Path(__file__)):
        with pytest.raises(CqilError, match="cannot read certificates"):
            measured(Target("https://127.0.0.1:1", ca_cert=ca_cert))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("num_prompts", 0, "a whole number, at least 1"),
        ("max_concurrency", (4, 0), "a whole number, at least 1"),
        ("request_rate", 0.0, "a number, above 0"),
        ("burstiness", float("nan"), "a finite number, above 0"),
        ("temperature", float("inf"), "a finite number, at least 0"),
    ],
)
def test_values_out_of_range(name: str, value: Any, rule: str) -> None:
    with pytest.raises(CqilError, match=rf"{name} is \S+ but must be {rule}$"):
        Load(**{name: value})


# The command.


def invoked(server: Server, folder: Path, options: str) -> Result:
    always = ["serve", "--base-url", f"{server.url}/v1", "--num-warmups", "0", "-o", str(folder)]
    environment = {"CQIL_API_KEY": "a-secret", "COLUMNS": "120"}
    return CliRunner().invoke(app, [*always, *options.split()], env=environment)


def test_the_command_prints_tables_and_writes_json(behave: Behave, tmp_path: Path) -> None:
    server = behave(api_key="a-secret", faults={3: "429"})
    options = "--max-concurrency 1,2 --max-concurrency 3 --repeats 2 --num-prompts 5"
    result = invoked(server, tmp_path, f"{options} --request-rate 500 --no-usage")
    assert result.exit_code == 0, result.output
    for expected in ("Throughput", "Latency, ms", "TTFT", "p99", "queueing", "HTTP 429", "usage"):
        assert expected in result.output
    text = (tmp_path / "serve.json").read_text()
    assert "a-secret" not in text
    written = json.loads(text, parse_constant=pytest.fail)
    told = {"base_url": server.url, "model": "tiny", "served_by": "a test", "usage": False}
    assert written["setting"].items() >= told.items()
    assert written["setting"]["prompts"]["hash"] == prompts.content_hash()
    assert [entry["max_concurrency"] for entry in written["results"]] == [1, 2, 3]
    assert sum(entry["failed"] for entry in written["results"]) == 1
    assert written["client_cpu_share"] > 0
    assert not written["interrupted"]


def test_bounds_that_are_no_numbers() -> None:
    result = CliRunner().invoke(app, ["serve", "--max-concurrency", "1;2"])
    assert result.exit_code == 2
    assert "--max-concurrency" in result.output


def test_a_run_without_any_answer_fails(behave: Behave, tmp_path: Path) -> None:
    server = behave(faults=dict.fromkeys(range(1, 10), "429"))
    result = invoked(server, tmp_path, "--num-prompts 2")
    assert result.exit_code == 1
    assert "HTTP 429: too many" in result.output


def test_ctrl_c_reports_what_there_is(behave: Behave, tmp_path: Path) -> None:
    server = behave(faults={8: "ctrl-c"})
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # as programs start with
    try:
        result = invoked(server, tmp_path, "--num-prompts 1000 --max-concurrency 2")
    finally:
        signal.signal(signal.SIGINT, former)
    assert result.exit_code == 130, result.output
    assert "Interrupted" in result.output
    written = json.loads((tmp_path / "serve.json").read_text())
    assert written["interrupted"]
    (entry,) = written["results"]
    assert 0 < entry["completed"] < 1000
    assert entry["failed"] == 0


def test_the_command_line_starts_without_an_http_client() -> None:
    code = "import sys, cqil_dist.cli.bench; print('httpx' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
