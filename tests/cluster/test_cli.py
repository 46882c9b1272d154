"""The `cqil` command, run as users run it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.commands import cqil, start_cqil
from helpers.tiny_models import TinyModel, TinyModelFactory
from helpers.watching import descendants, wait_for
from typer.main import get_command
from typer.testing import CliRunner

from cqil_dist.cli.app import app


@pytest.fixture(scope="module")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


def test_generate_prints_one_json_object(model: TinyModel) -> None:
    result = cqil(
        *("generate", "--model", str(model.path), "--plan", "P2 S0 E6 D0", "--ranks", "2"),
        *("--prompt", "The capital of", "--max-tokens", "5", "--temperature", "0"),
        *("--ignore-eos", "--max-len", "64", "--json"),
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert len(answer["token_ids"]) == 5
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5
    assert len(answer["timings"]["itl_ms"]) == 4
    assert answer["timings"]["itl_p90_ms"] >= answer["timings"]["itl_p50_ms"]
    assert [group["layers"] for group in answer["plan"]["groups"]] == [[0, 1], [2, 3], [4, 5]]
    assert answer["exchanges_per_token"] == 3
    assert [rank["rank"] for rank in answer["ranks"]] == [0, 1]
    assert {"node_id", "address", "pid", "device", "weight_bytes", "kv_bytes"} <= set(
        answer["ranks"][0]
    )
    assert answer["text"] == model.tokenizer.decode(answer["token_ids"], skip_special_tokens=True)


def test_generate_streams_text_to_standard_output_alone(model: TinyModel) -> None:
    """Nothing else is written there even when a rank is lost, which Ray likes to report."""
    prompt_ids = model.tokenizer("The capital of")["input_ids"]
    expected = model.original.generate(
        torch.tensor([prompt_ids]), max_new_tokens=100, do_sample=False, eos_token_id=None
    )[0, len(prompt_ids) :]
    process = start_cqil(
        *("generate", "--model", str(model.path), "--prompt", "The capital of"),
        *("--max-tokens", "100", "--temperature", "0", "--ignore-eos"),
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        # Found before there is text: all of it takes no longer than looking for processes.
        wait_for(lambda: bool(descendants("ray::LayerActor", process.pid)), "a rank")
        (rank,) = descendants("ray::LayerActor", process.pid)
        first = process.stdout.read(1)
        rank.kill()
        # Not `communicate`, which knows nothing of what `read` has read ahead.
        rest = process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(60) == 0, errors
    finally:
        process.kill()
    assert "Loading weights" in errors
    text = model.tokenizer.decode(expected, skip_special_tokens=True)
    assert first + rest == text.rstrip("\ufffd") + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "", "--max-tokens", "1"], "the prompt is empty"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p is 1.5"),
        (["--prompt", "x", "--plan", "P2 S4"], "'P2 S4' is not a plan"),
        (["--prompt", "x", "--plan", "P2 S4 E7 D0"], "E is 7 but the model has 6 layers"),
    ],
)
def test_mistakes_are_said_before_anything_starts(
    model: TinyModel, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["generate", "--model", str(model.path), *arguments])
    assert result.exit_code == 1
    assert message in result.output


def test_a_mistake_gets_one_line_and_a_failing_exit() -> None:
    result = cqil("generate", "--model", "no-such-model", "--prompt", "x")
    assert result.returncode == 1
    assert "no-such-model" in result.stderr
    assert "smollm2-135m" in result.stderr
    assert "Traceback" not in result.stderr


def test_plan_show_tells_depth_exchanges_and_shares(model: TinyModel) -> None:
    arguments = ["plan", "show", "P2 S0 E6 D1", "--model", str(model.path), "--ranks", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["depth"] == 3
    assert shown["ideal_reduction"] == 0.5
    assert shown["exchanges_per_token"] == 6
    assert [rank["layers"] for rank in shown["ranks"]] == [[0, 2, 4], [1, 3, 5]]
    assert "serial depth 3 of 6 layers" in CliRunner().invoke(app, arguments).output


def test_plan_show_tells_what_is_split_and_what_lies_otherwise_for_a_second_plan(
    model: TinyModel,
) -> None:
    arguments = ["plan", "show", "P2 S1 E5 D1", "--model", str(model.path), "--ranks", "2"]
    arguments += ["--ungrouped", "shard", "--compare", "sequential"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert (
        "layers 1-4 of the plan to compare with are computed as the first plan has them"
        in (shown["compared"])
    )
    first, second = (rank["shards"] for rank in shown["ranks"])
    assert [shard["layer"] for shard in first] == [shard["layer"] for shard in second] == [0, 5]
    for one, other in zip(first, second, strict=True):
        assert one["heads"][0] == one["columns"][0] == 0
        assert (one["heads"][1], one["columns"][1]) == (other["heads"][0], other["columns"][0])
    assert "0, 5: heads 0-" in CliRunner().invoke(app, arguments).output


def test_verify_passes_and_says_what_it_compared(model: TinyModel) -> None:
    result = cqil("verify", "--model", str(model.path), "--plan", "P2 S0 E6 D1", "--ranks", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ok  ") == 3
    assert "transformers" in result.stdout


def test_latency_of_a_plan_goes_into_the_report(model: TinyModel, tmp_path: Path) -> None:
    result = cqil(
        *("bench", "latency", "--model", str(model.path), "--plan", "P2 S0 E6 D0"),
        *("--prompt-tokens", "8", "--output-tokens", "8", "--repeats", "1", "-o", str(tmp_path)),
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "latency.json").read_text(encoding="utf-8"))["results"]
    assert [(each["depth"], each["ranks"]) for each in results] == [(6, 1), (6, 1), (3, 2)]
    assert all(each["itl_p50_ms"] > 0 for each in results)
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    rows = re.findall(r"<tr><td class=.plan.>.*?</tr>", report(tmp_path), re.DOTALL)
    for each, row in zip(results[1:], rows, strict=True):
        assert f">{each['itl_p50_ms']:.1f}<" in row


def report(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_help_explains_every_command() -> None:
    shown = cqil("--help").stdout
    commands = get_command(app).list_commands(None)  # type: ignore[attr-defined]
    assert len(commands) > 5
    for command in commands:
        assert re.search(rf"^\W*{command} +\w", shown, re.MULTILINE), command
