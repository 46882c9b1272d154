"""Calibration text depends on files and a seed alone, and is not sampled twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.planning_cases import TEXT, measured_model
from helpers.tiny_models import TinyModel

from cqil_dist.errors import TextError
from cqil_dist.planning.measure import sampling, windows
from cqil_dist.planning.measure.compute_config import ComputeConfig
from cqil_dist.planning.measure.measured_model import MeasuredModel
from cqil_dist.planning.measure.sampling import SeedPrompts
from cqil_dist.planning.measure.windows import Windows, read_windows
from cqil_dist.progress import SilentProgress, Task


class CountedProgress(SilentProgress):
    """Records the tasks that were opened."""

    def __init__(self) -> None:
        self.opened: list[Task] = []

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        self.opened.append(Task(total))
        yield self.opened[-1]


def _joined(tokens: list[int]) -> str:
    return "," + "".join(f"{token}," for token in tokens)


def test_windows_follow_from_the_seed(tiny: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    chosen = [read_windows([file], tiny.tokenizer, 16, 5, seed) for seed in (0, 0, 1)]
    assert chosen[0].digest == chosen[1].digest != chosen[2].digest
    whole = read_windows([file], tiny.tokenizer, 16)
    text: list[int] = whole.token_ids_WT.flatten().tolist()
    assert text == tiny.tokenizer(TEXT)["input_ids"][: len(text)]


def test_a_long_text_is_read_in_parts(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts end with a line, so that their tokens are those of the text; windows come from all."""
    monkeypatch.setattr(windows, "_BLOCK", 300)
    lines = [f"Line {number} of a book that goes on for long.\n" for number in range(100)]
    file = tmp_path / "text.txt"
    file.write_text("".join(lines), encoding="utf-8")
    progress = CountedProgress()
    rows = read_windows([file], tiny.tokenizer, 8, progress=progress).token_ids_WT.tolist()
    (task,) = progress.opened
    assert task.total is not None
    assert 10 < task.total == task.completed
    text = _joined([token for line in lines for token in tiny.tokenizer(line)["input_ids"]])
    at = 0
    for row in rows:
        at = text.index(_joined(row), at)
    assert at > 0.95 * len(text)


def test_text_is_sampled_from_the_model_once(tiny: TinyModel, tmp_path: Path) -> None:
    first = measured_model(tiny).windows([], 16, 64, seed=0)
    assert first.token_ids_WT.shape == (4, 16)
    (kept,) = tmp_path.rglob("sampled-*.pt")
    written = kept.stat().st_mtime_ns
    assert measured_model(tiny).windows([], 16, 64, seed=0).digest == first.digest
    assert kept.stat().st_mtime_ns == written
    kept.unlink()
    assert measured_model(tiny).windows([], 16, 64, seed=0).digest == first.digest
    assert measured_model(tiny).windows([], 16, 64, seed=1).digest != first.digest


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    drawn = sampling._drawn(probabilities.log().expand(20_000, 5), generator)
    frequencies = drawn.bincount(minlength=5) / len(drawn)
    torch.testing.assert_close(frequencies, probabilities, atol=0.015, rtol=0)
    assert frequencies[2] == 0


def test_sampling_that_was_interrupted_goes_on(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_WINDOWS_AT_ONCE", 2)
    whole = measured_model(tiny).windows([], 16, 96, seed=0)
    (kept,) = tmp_path.rglob("sampled-*.pt")
    torch.save(whole.token_ids_WT[:4], kept)
    counted = CountedProgress()
    assert measured_model(tiny, counted).windows([], 16, 96, seed=0).digest == whole.digest
    assert [task.completed for task in counted.opened] == [2 * 16], "only what was missing"


def test_text_is_extended_by_what_the_model_says_after_it(tiny: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    read = measured_model(tiny).windows([file], 16, 64, seed=0)
    extended = measured_model(tiny).extended(read, 128, seed=0)
    assert extended.digest == measured_model(tiny).extended(read, 128, seed=0).digest
    assert extended.checksums == read.checksums
    rows: list[list[int]] = extended.token_ids_WT.tolist()
    assert len(rows) == 4 + 8
    for row in read.token_ids_WT.tolist():
        rows.remove(row)
    text = _joined(read.token_ids_WT.flatten().tolist())
    assert sum(_joined(row[:2]) in text for row in rows) >= 3, "every second one"
    assert not any(_joined(row) in text for row in rows)
    assert all(0 <= token < tiny.config.vocab_size for row in rows for token in row)


def test_windows_begin_as_every_text_does(tiny: TinyModel, tmp_path: Path) -> None:
    """Read and sampled windows start with the tokenizer's leading token, if it has one."""
    begun = tmp_path / "begun"
    shutil.copytree(tiny.path, begun)
    described = json.loads((begun / "tokenizer.json").read_text(encoding="utf-8"))
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "B", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"B": {"id": "B", "ids": [7], "tokens": ["B"]}},
    }
    (begun / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    model = MeasuredModel.of(str(begun), ComputeConfig("cpu"), SilentProgress())
    assert model.tokenizer(TEXT)["input_ids"][0] == 7
    read = model.windows([file], 16, 64, seed=0)
    for text in (read, model.windows([], 16, 64, seed=0), model.extended(read, 128, seed=0)):
        assert text.token_ids_WT.shape[1] == 16
        assert (text.token_ids_WT[:, 0] == 7).all()
    whole: list[int] = model.windows([file], 16, None, 0).token_ids_WT[:, 1:].flatten().tolist()
    assert whole == tiny.tokenizer(TEXT)["input_ids"][: len(whole)], "nothing is left out"


def test_excerpts_of_a_text_begin_every_second_window() -> None:
    text = Windows(torch.arange(160, 224).view(4, 16), "a")
    drawn_WT = SeedPrompts(torch.arange(10), text=text).draw(
        200, 16, torch.Generator().manual_seed(0)
    )
    lengths = set()
    for index, window_T in enumerate(drawn_WT):
        prompt = window_T[window_T >= 0].tolist()
        assert prompt == window_T[: len(prompt)].tolist(), "the model goes on from there"
        if index % 2:
            assert len(prompt) == 1
            assert prompt[0] < 10
        else:
            assert prompt == list(range(prompt[0], prompt[0] + len(prompt)))
            assert prompt[0] // 16 == prompt[-1] // 16
            lengths.add(len(prompt))
    assert lengths == set(range(1, 9))


def test_all_text_cannot_be_held_out() -> None:
    windows = Windows(torch.zeros(4, 8, dtype=torch.long), "zeros")
    train, kept = windows.split(3)
    assert (len(train.token_ids_WT), len(kept.token_ids_WT)) == (1, 3)
    with pytest.raises(TextError, match="4 windows of text, of which 4 are to be held out"):
        windows.split(4)


def test_windows_of_another_shape_are_other_windows() -> None:
    rows = torch.arange(16)
    assert Windows(rows.view(2, 8), "a").digest != Windows(rows.view(4, 4), "a").digest


def test_windows_longer_than_the_model_takes_are_refused(tiny: TinyModel, tmp_path: Path) -> None:
    most = tiny.config.max_positions
    with pytest.raises(TextError, match=f"{most + 1} tokens but the model takes {most}; give a"):
        measured_model(tiny).windows([tmp_path / "any.txt"], most + 1, None, seed=0)


def test_text_that_is_too_short_is_said(tiny: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("The sea.", encoding="utf-8")
    with pytest.raises(TextError, match=r"hold 0 windows of 32 tokens but 1 are needed"):
        read_windows([file], tiny.tokenizer, 32)
    with pytest.raises(TextError, match="cannot read text"):
        read_windows([tmp_path / "absent.txt"], tiny.tokenizer, 32)
