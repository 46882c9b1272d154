"""One service of `cqil serve`, which users ask, disturb, trace and end."""

from __future__ import annotations

import itertools
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from helpers.commands import Serving, cqil, cqil_serve
from helpers.tiny_models import TinyModel, TinyModelFactory, tiny_config
from helpers.watching import wait_for
from typer.testing import CliRunner

from cqil_dist import Client
from cqil_dist.cli.app import app

KEY = "a key for the tests"
MAX_LEN = 400
DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana-dashboard.json"
PROMPT = "The harbour lies by the sea"
LONG: dict[str, Any] = {"max_tokens": MAX_LEN - 60, "temperature": 0}


def openai_of(service: Serving, **options: Any) -> openai.OpenAI:
    settings = {"api_key": KEY, "max_retries": 0, **options}
    return openai.OpenAI(base_url=f"{service.http}/v1", **settings)


def client_of(service: Serving) -> Client:
    return Client(service.grpc, api_key=KEY)


@pytest.fixture(scope="module")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    """A model with a context for streams that last long enough to be disturbed."""
    return tiny_model(tiny_config(max_position_embeddings=MAX_LEN))


@pytest.fixture(scope="module")
def service(model: TinyModel) -> Iterator[Serving]:
    with cqil_serve(
        *(str(model.path), "--plan", "P2 S0 E6 D1", "--ranks", "2", "--compare", "sequential"),
        *("--served-model-name", "tiny", "--max-len", str(MAX_LEN)),
        *("--log-json", "--step-deadline-s", "10"),
        CQIL_API_KEY=KEY,
    ) as service:
        yield service


def test_it_says_where_and_for_whom(service: Serving) -> None:
    assert re.fullmatch(r"127\.0\.0\.1:\d+", service.grpc)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", service.http)
    assert any("this machine alone" in line for line in service.errors)


def test_both_plans_answer_as_their_references_do(service: Serving, model: TinyModel) -> None:
    ids = model.tokenizer(PROMPT)["input_ids"]
    with openai_of(service) as client:
        assert [each.id for each in client.models.list()] == ["tiny", "tiny:sequential"]
        for name, plan in (("tiny", "P2 S0 E6 D1"), ("tiny:sequential", "sequential")):
            answer = client.completions.create(
                model=name,
                prompt=PROMPT,
                max_tokens=20,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            tokens = answer.choices[0].model_extra["token_ids"]  # type: ignore[index]
            logits = model.reference_logits(model.plan(plan), [*ids, *tokens])
            assert tokens == logits[len(ids) - 1 : -1].argmax(-1).tolist()


def test_status_tells_plans_ranks_and_load(service: Serving) -> None:
    status = httpx.get(f"{service.http}/status", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert [len(each["plan"]["groups"]) for each in status["models"]] == [3, 6]
    assert [rank["rank"] for rank in status["ranks"]] == [0, 1]
    assert status["free_slots"] == status["slots"] == 8


@pytest.mark.parametrize("victim", ["ray::Coordinator", "ray::LayerActor"])
def test_streams_of_any_kind_outlive_what_computes_them(service: Serving, victim: str) -> None:
    """That holds over HTTP as well, where clients cannot resume a stream themselves."""
    with openai_of(service) as http_client, client_of(service) as client:
        expected = http_client.completions.create(
            model="tiny", prompt=PROMPT, **LONG, extra_body={"ignore_eos": True}
        )
        events = http_client.completions.create(
            model="tiny", prompt=PROMPT, **LONG, extra_body={"ignore_eos": True}, stream=True
        )
        chunks = client.generate(PROMPT, **LONG, ignore_eos=True, stream=True)
        texts = [next(events).choices[0].text, next(chunks).text]
        service.processes(victim)[0].kill()
        over_http = texts[0] + "".join(event.choices[0].text for event in events)
        over_grpc = texts[1] + "".join(chunk.text for chunk in chunks)
    assert over_http == over_grpc == expected.choices[0].text
    with client_of(service) as client:
        wait_for(lambda: client.status().free_slots == 8, "all slots are free")
    assert httpx.get(f"{service.http}/health").text == "ok"


def test_the_dashboard_shows_metrics_that_there_are(service: Serving) -> None:
    """This comes after a recovery, so that every metric has a value."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    shown = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"ray_cqil_\w+", target["expr"])
    }
    assert len(shown) > 10
    with openai_of(service) as client:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4)

    def missing() -> set[str]:
        lines = httpx.get(f"{service.http}/metrics", timeout=30).text.splitlines()
        return shown - {re.split(r"[{ ]", line)[0] for line in lines if line[:1] != "#"}

    wait_for(lambda: not missing(), f"metrics for {missing()}", timeout_s=40)


def test_a_trace_holds_every_part_of_every_group_on_every_rank(
    service: Serving, tmp_path: Path
) -> None:
    file = tmp_path / "trace.json"
    result = cqil(
        *("trace", "--server", service.grpc, "--api-key", KEY, "--prompt", PROMPT),
        *("--max-tokens", "5", "--output", str(file)),
    )
    assert result.returncode == 0, result.stderr
    written = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in written if event["ph"] == "X"]
    steps = [event for event in events if event["pid"] == 0 and event["name"] == "decode"]
    assert len(steps) == 4
    for step in steps:
        start, end = step["ts"], step["ts"] + step["dur"]
        for process in (1, 2):
            parts = [e for e in events if e["pid"] == process and start <= e["ts"] < end]
            # P2 D1 over two ranks: both compute one layer of each group, and meet twice.
            assert [(part["args"]["kind"], part["args"]["group"]) for part in parts] == [
                *(
                    (kind, group)
                    for group in range(3)
                    for kind in (
                        "attention",
                        "attention exchange",
                        "feed forward",
                        "output exchange",
                    )
                ),
                ("head", 3),
            ]
            for part, following in itertools.pairwise(parts):
                assert following["ts"] == pytest.approx(part["ts"] + part["dur"], abs=0.01)
            assert parts[-1]["ts"] + parts[-1]["dur"] <= end


def test_the_log_is_json_and_keeps_secrets(service: Serving) -> None:
    with openai_of(service) as client:
        client.completions.create(model="tiny", prompt="a private matter", max_tokens=2)
    with (
        openai_of(service, api_key="a wrong key") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    wait_for(lambda: "401" in service.errors[-1], "the refusal is logged")
    lines = [line for line in service.errors if line.startswith("{")]
    entries = [json.loads(line) for line in lines]
    assert {"time", "level", "message"} <= entries[0].keys()
    log = "".join(service.errors)
    assert not [secret for secret in (KEY, "a wrong key", "a private matter") if secret in log]


def test_on_sigterm_it_finishes_what_runs_and_leaves_nothing(service: Serving) -> None:
    """This is the last test of the service, which it ends."""
    with openai_of(service) as client:
        events = client.completions.create(
            model="tiny", prompt=PROMPT, **LONG, extra_body={"ignore_eos": True}, stream=True
        )
        next(events)
        started = service.processes()
        service.process.send_signal(signal.SIGTERM)
        finish_reasons = [event.choices[0].finish_reason for event in events]
    assert finish_reasons[-1] == "length"
    assert service.process.wait(timeout=60) == 0
    deadline = time.monotonic() + 30
    while any(each.is_running() for each in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [each.name() for each in started if each.is_running()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tls-cert", "cert.pem"], "tls_cert and tls_key belong together"),
        (["--http-port", "70000"], "http_port is 70000"),
        (["--grpc-port", "8000"], "grpc_port and http_port are both 8000"),
        (["--compare", "P2 S4"], "'P2 S4' is not a plan"),
        (["--compare", "sequential"], "is the same plan"),
        (["--max-waiting", "-1"], "max_waiting is -1"),
    ],
)
def test_mistakes_are_said_before_anything_starts(
    model: TinyModel, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["serve", str(model.path), *arguments])
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize("option", ["--grpc-port", "--http-port"])
def test_a_taken_port_is_said_before_anything_starts(model: TinyModel, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", str(model.path), option, str(port)])
    assert result.exit_code == 1
    assert f"cannot serve at 127.0.0.1:{port}" in result.output


def test_an_empty_key_is_no_open_door(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that did not arrive is not taken for the wish to let everybody in."""
    monkeypatch.setenv("CQIL_API_KEY", "")
    result = CliRunner().invoke(app, ["serve", str(model.path)])
    assert result.exit_code == 1
    assert "CQIL_API_KEY is empty" in result.output
