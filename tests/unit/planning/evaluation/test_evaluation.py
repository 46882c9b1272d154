"""Scores equal those of lm-eval and transformers, with and without a plan."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from helpers.adapters import random_adapter
from helpers.lm_eval_task import QUESTIONS, local_tasks
from helpers.lm_eval_task import evaluate as evaluate_with_lm_eval
from helpers.planning_cases import TEXT, measured_model
from helpers.tiny_models import TinyModel
from scipy.stats import t
from typer.testing import CliRunner

from cqil_dist.cli.app import app
from cqil_dist.errors import TextError
from cqil_dist.model.adapter import Adapter
from cqil_dist.planning.evaluation import evaluate as evaluate_module
from cqil_dist.planning.evaluation.evaluate import Evaluation, evaluate
from cqil_dist.planning.evaluation.intervals import compare_means, compare_perplexities, mean_of
from cqil_dist.planning.evaluation.tasks import read_task
from cqil_dist.planning.measure.windows import read_windows
from cqil_dist.progress import SilentProgress

PLAN = "P2 S0 E6 D1"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """The same questions as lm-eval's task, which separates choice and context by a blank."""
    file = tmp_path / "harbour.jsonl"
    items = [
        {
            "context": question["question"],
            "choices": [f" {choice}" for choice in question["choices"]],  # type: ignore[attr-defined]
            "gold": question["gold"],
        }
        for question in QUESTIONS
    ]
    file.write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    return file


def evaluated(
    tiny: TinyModel, plan: str, tasks: list[Path], adapter: Path | None = None
) -> Evaluation:
    changes = None if adapter is None else Adapter(adapter)
    return evaluate(
        measured_model(tiny), tiny.plan(plan), changes, [], [read_task(f) for f in tasks]
    )


def test_scores_are_lm_evals(
    tiny: TinyModel, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval scores the original model by its own class, and a plan with an adapter by ours."""
    import cqil_dist.planning.evaluation.lm_eval  # noqa: F401 (registers "cqil")

    adapter = random_adapter(tmp_path / "adapter", tiny)
    tasks = local_tasks(tmp_path, monkeypatch)
    original = evaluate_with_lm_eval(
        tasks, "hf", pretrained=str(tiny.path), dtype="float32", device="cpu"
    )
    other = evaluate_with_lm_eval(
        tasks, "cqil", pretrained=str(tiny.path), plan=PLAN, adapter=str(adapter), device="cpu"
    )
    acc, acc_norm = evaluated(tiny, PLAN, [questions], adapter).results
    for result, likely in ((acc, most_likely), (acc_norm, most_likely_by_length)):
        assert result.of.items == f"{len(QUESTIONS)} questions"
        assert result.paired.original.value == pytest.approx(accuracy(original, likely))
        assert result.paired.other.value == pytest.approx(accuracy(other, likely))


def most_likely(scores: list[float], choices: list[str]) -> int:
    return scores.index(max(scores))


def most_likely_by_length(scores: list[float], choices: list[str]) -> int:
    return most_likely([s / len(c) for s, c in zip(scores, choices, strict=True)], choices)


def accuracy(found: list[list[tuple[float, bool]]], likely: Any) -> float:
    right = [
        likely([score for score, _ in answers], question["choices"]) == question["gold"]
        for answers, question in zip(found, QUESTIONS, strict=True)
    ]
    return fmean(right)


def test_log_likelihoods_are_lm_evals(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cqil_dist.planning.evaluation.scoring import Request, encode, likelihoods

    tasks = local_tasks(tmp_path, monkeypatch)
    expected = evaluate_with_lm_eval(
        tasks, "hf", pretrained=str(tiny.path), dtype="float32", device="cpu"
    )
    model = measured_model(tiny)
    requests = [
        Request(str(question["question"]), f" {choice}")
        for question in QUESTIONS
        for choice in question["choices"]  # type: ignore[attr-defined]
    ]
    encoded = [encode(model.tokenizer, each, 128) for each in requests]
    found = likelihoods(model.model, encoded, SilentProgress(), "")
    flat = [answer for answers in expected for answer in answers]
    assert [each.logprob for each in found] == pytest.approx([a[0] for a in flat], abs=1e-3)
    assert [each.greedy for each in found] == [a[1] for a in flat]


def test_perplexity_is_transformers_loss(tiny: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    windows = read_windows([file], tiny.tokenizer, 32)
    (result,) = evaluate(measured_model(tiny), tiny.plan(PLAN), None, [windows], []).results
    losses = []
    for row in windows.token_ids_WT:
        with torch.inference_mode():
            losses.append(float(tiny.original(row[None], labels=row[None]).loss))
    assert result.paired.original.value == pytest.approx(math.exp(fmean(losses)), rel=1e-4)
    half = float(t.ppf(0.975, len(losses) - 1)) * stdev(losses) / math.sqrt(len(losses))
    assert result.paired.original.low == pytest.approx(math.exp(fmean(losses) - half), rel=1e-4)
    changed = result.paired.other.value / result.paired.original.value
    assert result.paired.difference.value == pytest.approx(changed, rel=1e-4)


def test_the_original_is_scored_once(
    tiny: TinyModel, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original model's scores on a text or a task are kept for every other plan."""
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(TEXT, encoding="utf-8")
    other.write_text(TEXT.swapcase(), encoding="utf-8")
    adapter = Adapter(random_adapter(tmp_path / "adapter", tiny))
    computed: list[str] = []
    for name in ("loss_by_window", "likelihoods"):
        monkeypatch.setattr(
            evaluate_module, name, counted(computed, getattr(evaluate_module, name))
        )

    def run(file: Path) -> Evaluation:
        windows = read_windows([file], tiny.tokenizer, 32)
        return evaluate(model, tiny.plan(PLAN), adapter, [windows], [read_task(questions)])

    model = measured_model(tiny)
    first = run(text)
    assert computed == ["loss_by_window", "likelihoods"] * 2
    assert run(text) == first, "the adapter does not stay in the model"
    assert computed == ["loss_by_window", "likelihoods"] * 3
    run(other)
    assert computed[6:] == ["loss_by_window", "loss_by_window", "likelihoods"]


def counted(names: list[str], function: Any) -> Any:
    """A function that notes the name of another when it calls it."""

    def call(*arguments: Any) -> Any:
        names.append(function.__name__)
        return function(*arguments)

    return call


def test_the_last_word_must_be_the_greedy_one(tiny: TinyModel, tmp_path: Path) -> None:
    context = "The harbour lies by"
    ids = tiny.tokenizer(context)["input_ids"]
    likely = tiny.tokenizer.decode(tiny.original_logits(ids)[-1].argmax())
    file = tmp_path / "last.jsonl"
    items = [{"context": context, "continuation": each} for each in (likely, " zebra")]
    file.write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    acc, _ = evaluated(tiny, PLAN, [file]).results
    assert acc.paired.original.value == 0.5


def test_which_of_two_contexts(tiny: TinyModel, tmp_path: Path) -> None:
    contexts, continuation = ["The sea of", "Every morning of"], " bread and fish"
    totals = []
    for context in contexts:
        ids = tiny.tokenizer(context)["input_ids"]
        whole = tiny.tokenizer(context + continuation)["input_ids"]
        logprobs = tiny.original_logits(whole).log_softmax(-1)
        totals.append(sum(float(logprobs[i - 1, whole[i]]) for i in range(len(ids), len(whole))))
    file = tmp_path / "which.jsonl"
    for gold in (0, 1):
        item = {"contexts": contexts, "continuation": continuation, "gold": gold}
        file.write_text(f"{json.dumps(item)}\n" * 2, encoding="utf-8")
        acc, _ = evaluated(tiny, PLAN, [file]).results
        assert acc.paired.original.value == float(totals[gold] == max(totals))


def test_pairing_is_sharper_than_two_intervals() -> None:
    """Items that are hard for one model are hard for the other."""
    original = [float(i % 2) for i in range(200)]
    other = [0.0 if i == 7 else value for i, value in enumerate(original)]
    paired = compare_means(original, other)
    assert paired.difference.value == pytest.approx(-0.005)
    apart = paired.original.high - paired.original.low
    assert paired.difference.high - paired.difference.low < apart / 5
    ratio = compare_perplexities([2.0, 3.0], [2.1, 3.1]).difference
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((math.exp(0.1),) * 3)
    mean = mean_of([paired, paired])
    assert mean.original.value == pytest.approx(0.5)
    assert mean.original.high - 0.5 == pytest.approx((paired.original.high - 0.5) / math.sqrt(2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not an item"),
        ('{"context": "a", "choices": ["b"]}', "line 3: not an item"),
        ('{"context": "a", "choices": ["b"], "gold": 1}', "gold is 1 of 1"),
        ('{"context": "a", "choices": ["b", "c"], "gold": true}', "gold is True of 2"),
        ('{"context": "a", "choices": "bc", "gold": 1}', "'bc' is no list"),
        ('{"context": null, "continuation": " b"}', "None is no text"),
        ("[1]", "line 3: not an item"),
    ],
)
def test_lines_that_are_no_items_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "odd.jsonl"
    good = '{"context": "a", "continuation": " b"}'
    file.write_text(f"{good}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(TextError, match=message):
        read_task(file)
    assert len(read_task(file, limit=1).items) == 1


def test_what_cannot_be_scored_is_said_before_anything_is(tiny: TinyModel, tmp_path: Path) -> None:
    text, long = tmp_path / "text.txt", tmp_path / "long.jsonl"
    text.write_text(TEXT, encoding="utf-8")
    windows = read_windows([text], tiny.tokenizer, 32)
    item = json.dumps({"context": "The", "continuation": " sea" * tiny.config.max_positions})
    long.write_text(f"{item}\n" * 2, encoding="utf-8")
    with pytest.raises(
        TextError, match=rf"' sea sea.* the model takes {tiny.config.max_positions}"
    ):
        evaluate(measured_model(tiny), tiny.plan(PLAN), None, [windows], [read_task(long)])
    with pytest.raises(TextError, match=r"two texts or tasks are called text\.txt"):
        evaluate(measured_model(tiny), tiny.plan(PLAN), None, [windows, windows], [])
    assert not list(tmp_path.rglob("scored-*"))


def test_one_item_is_refused_before_anything_is_scored(tiny: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"context": "a", "continuation": " b"}\n', encoding="utf-8")
    with pytest.raises(TextError, match="one has 1 item, but an interval takes 2 or more"):
        evaluated(tiny, PLAN, [file])


def test_nothing_to_evaluate_on_is_said(tiny: TinyModel, tmp_path: Path) -> None:
    for arguments, message in (
        ([], "nothing to evaluate on"),
        (["--tasks", "sciq", "--task-dir", str(tmp_path)], "no task 'sciq'"),
    ):
        result = CliRunner().invoke(app, ["eval", "--model", str(tiny.path), *arguments])
        assert result.exit_code == 1
        assert message in result.output
