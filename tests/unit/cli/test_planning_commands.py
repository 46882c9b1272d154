"""The commands as a user runs them, one after another, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.browsing import chromium
from helpers.tiny_models import TinyModel, TinyModelFactory
from typer.testing import CliRunner

from cqil_dist.benchmarks.latency import Result
from cqil_dist.cli.app import app
from cqil_dist.model.adapter import Adapter
from cqil_dist.plan import Plan
from cqil_dist.planning.report import write_report
from cqil_dist.records import headed, write_record

TEXT = "The keeper of the lighthouse walks to the market to buy bread, fish and news. " * 40


@pytest.fixture(scope="module")
def tiny(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After all commands: what they have written."""
    folder = tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CQIL_CACHE", str(folder / "cache"))
        text, other = folder / "text.txt", folder / "other.txt"
        text.write_text(TEXT, encoding="utf-8")
        other.write_text(TEXT.replace("bread", "salt"), encoding="utf-8")
        plan, adapter = str(folder / "plan.json"), str(folder / "adapter")
        small = ["--tokens", "128", "--window", "32"]
        run("plan", "analyze", tiny, *small, "--max-group", "2", "-o", str(folder))
        run("plan", "search", tiny, *small, "--depth", "4", "-o", plan)
        run(
            *("plan", "search", tiny, *small, "--depth", "4"),
            *("--fit-tokens", "2048", "-o", str(folder / "fitted" / "plan.json")),
        )
        run(
            *("plan", "compensate", tiny, "--plan", plan, "--text", str(text), "--tokens", "512"),
            *("--window", "32", "--rank", "4", "-o", str(folder / "start")),
        )
        run(
            *("distill", tiny, "--plan", plan, "--text", str(text), "--tokens", "512"),
            *("--window", "32", "--held-out", "2", "--steps", "4", "--warmup-steps", "1"),
            *("--lora-r", "4", "--batch-size", "2", "--init", str(folder / "start"), "-o", adapter),
        )
        run(
            *("eval", tiny, "--plan", plan, "--adapter", adapter, "--ppl", str(other)),
            *("--window", "32", "-o", str(folder / "eval.json")),
        )
        # As `cqil bench latency -o` leaves them; real ranks are started in tests/cluster.
        timed = Result("plan", 4, 2, read(folder / "plan.json"), itl_ms=[[3.0, 4.5, 5.0]])
        setting = {"model": str(tiny.path)}
        latency = headed("latency", setting=setting, results=[timed.to_dict()])
        write_record(folder / "latency.json", latency)
        write_report(folder)
    return folder


def run(*arguments: Any) -> None:
    words: list[str] = []
    for argument in arguments:
        words += ["--model", str(argument.path)] if isinstance(argument, TinyModel) else [argument]
    result = CliRunner().invoke(app, [*words, "--device", "cpu"])
    assert result.exit_code == 0, result.output


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_what_cannot_be_is_said_before_anything_is_done(tiny: TinyModel, tmp_path: Path) -> None:
    """Whatever takes long would say that it began."""
    (tmp_path / "plan.json").write_text(json.dumps(tiny.plan("P2 S0 E6 D1").to_json()))
    distilled = tmp_path / "distilled"
    distilled.mkdir()
    (distilled / "training.pt").touch()
    compensated = tmp_path / "compensated"
    compensated.mkdir()
    for name in ("plan.json", "adapter_config.json"):
        (compensated / name).touch()
    plan = ["--plan", "P2 S0 E6 D1"]
    for words, message in (
        (["plan", "search", "--depth", "1"], "of up to 2 of 6 layers reach depths 3 to 6"),
        (["plan", "search", "--depth", "1", "--ranks", "4"], "of up to 3 of 6 layers reach"),
        (["plan", "compensate", "--plan", "sequential"], "it loses nothing to win back"),
        (["plan", "compensate", *plan, "-o", str(tmp_path)], "is no adapter's"),
        (["plan", "compensate", *plan, "-o", str(distilled)], "that was distilled"),
        (["distill", "--plan", "sequential"], "it loses nothing to win back"),
        (["distill", *plan, "--sampled-tokens", "64"], "beside files, but there are none"),
        (["distill", *plan, "-o", str(compensated)], "that was not distilled there"),
        (["eval", "--tasks", " ,"], "nothing to evaluate on"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            result = CliRunner().invoke(app, [*words, "--model", str(tiny.path)])
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())
        assert "..." not in result.output


def test_too_little_memory_is_said_with_ways_out(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the docs.")

    monkeypatch.setenv("CQIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", full)
    words = ["plan", "analyze", "--model", str(tiny.path), "--window", "32", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "error: the device's memory does not suffice: CUDA out of memory. Tried" in said
    assert "--window" in said
    assert "See the docs" not in said


def test_outputs_that_cannot_be_written_are_said_at_once(tiny: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for words in (
        ["plan", "search", "--depth", "4", "-o", str(tmp_path)],
        ["plan", "analyze", "-o", str(file)],
        ["distill", "--plan", "P2 S0 E6 D1", "-o", str(file)],
    ):
        result = CliRunner().invoke(app, [*words, "--model", str(tiny.path)])
        assert result.exit_code == 1
        assert "error:" in result.output


def test_the_analysis_has_every_group(folder: Path) -> None:
    analysis = read(folder / "analysis.json")
    assert len(analysis["similarity"]) == 6
    assert len(analysis["sensitivities"]) == 5 * 4
    for picture in ("analysis-similarity", "analysis-sensitivity", "plan-front"):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_is_the_best_that_was_measured(folder: Path) -> None:
    plan = read(folder / "plan.json")
    assert Plan.parse(plan, 6).depth == 4
    measured = read(folder / "plan-front.json")["measured"]
    kls = [each["kl"] for each in measured if each["kind"] == "search" and each["depth"] == 4]
    assert kls == [plan["measured"]["kl"]]
    assert {each["depth"] for each in measured} == {3, 4, 5, 6}


def test_compensation_tells_how_much_it_helps(folder: Path) -> None:
    measured = read(folder / "start" / "plan.json")["measured"]
    assert measured["fitted"]["tokens"] == 512 - 8 * 32
    assert measured["held_out"]["tokens"] == 8 * 32
    assert 0 < measured["held_out"]["kl_after"] < measured["held_out"]["kl_before"]


def test_a_compensation_that_does_harm_says_so(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows, learnt by heart."""
    monkeypatch.setenv("CQIL_CACHE", str(tmp_path / "cache"))
    words = ["--tokens", "320", "--window", "32", "--ridge", "1e-4", "-o", str(tmp_path / "fit")]
    plan = ["plan", "compensate", "--model", str(tiny.path), "--plan", "P2 S0 E6 D1"]
    result = CliRunner().invoke(app, [*plan, *words])
    assert result.exit_code == 0, result.output
    assert "does not help on text that it was not fitted to" in " ".join(result.output.split())


def test_a_search_for_compensation_measures_compensated(folder: Path) -> None:
    """Other text as well: what is fitted on is kept apart."""
    found = {
        where: {
            each["depth"]: each["kl"]
            for each in read(folder / where / "plan-front.json")["measured"]
            if each["kind"] == "search"
        }
        for where in (".", "fitted")
    }
    assert found["fitted"].keys() == found["."].keys()
    assert found["fitted"][3] < 0.9 * found["."][3]
    assert read(folder / "fitted" / "plan.json")["measured"]["compensation"]["tokens"] == 2048
    assert read(folder / "plan.json")["measured"]["compensation"] is None


@pytest.mark.parametrize(
    "words", [["plan", "show"], ["eval", "--ppl", "other.txt", "--window", "32", "--plan"]]
)
def test_a_plan_that_needs_compensation_says_so(
    folder: Path, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("CQIL_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    for plan, said in ((folder / "plan.json", False), (folder / "fitted" / "plan.json", True)):
        given = plan.read_text(encoding="utf-8") if "eval" in words else str(plan)
        result = CliRunner().invoke(app, [*words, given, "--model", str(tiny.path)])
        assert result.exit_code == 0, result.output
        assert ("give it with --adapter" in result.output) == said


def test_the_adapter_is_for_the_plan(folder: Path, tiny: TinyModel) -> None:
    adapter = Adapter(folder / "adapter")
    adapter.check(tiny.config)
    assert adapter.plan is not None
    assert Plan.parse(adapter.plan, 6) == Plan.parse(read(folder / "plan.json"), 6)
    assert (folder / "adapter" / "loss.png").is_file()


def test_a_page_leaves_out_what_it_cannot_read(folder: Path, tmp_path: Path) -> None:
    """What another version wrote, in the same folder, costs nobody the page."""
    write_record(tmp_path / "old.json", {"record": "front", "model": "other"})
    write_record(tmp_path / "analysis.json", read(folder / "analysis.json"))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Analysis" in page
    assert "written them: old.json" in page


def test_the_page_holds_everything_and_asks_for_nothing(folder: Path) -> None:
    """In a browser: all pictures show, and no other file or host is asked."""
    asked: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folder / "report.html").as_uri())
        titles = page.locator("h2").all_inner_texts()
        widths = page.eval_on_selector_all("img", "(all) => all.map((img) => img.naturalWidth)")
        (plan,) = page.locator("h2:has-text('Plans') ~ .scroll tr:has-text('4.5')").all()[:1]
        cells = plan.locator("td").all_inner_texts()
    assert [url for url in asked if not url.startswith("data:")] == [
        (folder / "report.html").as_uri()
    ]
    assert [title.split()[0] for title in titles] == ["Analysis", "Depth", "Plans", "Evaluation"]
    assert len(widths) == 3
    assert min(widths) > 300
    front = read(folder / "plan-front.json")["measured"]
    (found,) = [e for e in front if e["kind"] == "search" and e["depth"] == 4]
    (result,) = read(folder / "eval.json")["results"]
    assert cells[1:3] == ["4", str(found["exchanges"])]
    assert cells[3:5] == [f"{found['latency_us'] / 1000:.1f}", "4.5"]
    assert cells[5].startswith(f"{result['difference']['value']:.3f}x")
