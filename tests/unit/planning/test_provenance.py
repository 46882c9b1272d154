"""No plan or adapter is evaluated on text that it was made with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.planning_cases import TEXT
from helpers.tiny_models import TinyModel
from typer.testing import CliRunner

from cqil_dist.cli.app import app
from cqil_dist.errors import TextError
from cqil_dist.planning.measure.windows import Windows, read_windows
from cqil_dist.planning.provenance import made_with, refuse_seen_text
from cqil_dist.recommended.record import plan_record

PLAN = "P2 S0 E6 D1"


def test_text_that_a_plan_was_made_with_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    """The file's name makes no difference; other text is accepted."""
    seen, copied, other = (tmp_path / name for name in ("seen.txt", "copied.txt", "other.txt"))
    for file, text in ((seen, TEXT), (copied, TEXT), (other, TEXT.swapcase())):
        file.write_text(text, encoding="utf-8")
    plan = tmp_path / "plan.json"
    measured = made_with(read_windows([seen], tiny.tokenizer, 32))
    plan.write_text(json.dumps({**tiny.plan(PLAN).to_json(), "measured": measured}))
    arguments = ["eval", "--model", str(tiny.path), "--window", "32", "--device", "cpu"]
    inline = plan.read_text(encoding="utf-8")
    for given, file, code in (
        (str(plan), seen, 1),
        (f" {plan}", copied, 1),
        (inline, seen, 1),
        (str(plan), other, 0),
    ):
        result = CliRunner().invoke(app, [*arguments, "--plan", given, "--ppl", str(file)])
        assert result.exit_code == code, result.output
        assert ("was made with" in result.output) == (code == 1)


def test_what_an_adapter_was_made_from_is_not_forgotten(tiny: TinyModel, tmp_path: Path) -> None:
    """An adapter also lists the text that its plan was made with."""
    searched, fitted = tmp_path / "searched.txt", tmp_path / "fitted.txt"
    for file, text in ((searched, TEXT), (fitted, TEXT.swapcase())):
        file.write_text(text, encoding="utf-8")
    plan, adapter = tmp_path / "plan.json", tmp_path / "adapter"
    measured = made_with(read_windows([searched], tiny.tokenizer, 32))
    plan.write_text(json.dumps({**tiny.plan(PLAN).to_json(), "measured": measured}))
    common = ["--model", str(tiny.path), "--window", "32", "--device", "cpu"]
    made = ["--plan", str(plan), "--text", str(fitted), "-o", str(adapter)]
    made += ["--tokens", "320", "--held-out", "2"]
    result = CliRunner().invoke(app, ["plan", "compensate", *common, *made])
    assert result.exit_code == 0, result.output
    use = ["--plan", str(adapter / "plan.json"), "--adapter", str(adapter)]
    for file in (searched, fitted):
        result = CliRunner().invoke(app, ["eval", *common, *use, "--ppl", str(file)])
        assert result.exit_code == 1
        assert "was made with" in result.output


def test_a_record_without_files_knows_no_text(tiny: TinyModel) -> None:
    text = Windows(torch.zeros(2, 8, dtype=torch.long), "text.txt", frozenset(["a"]))
    for measured in (None, {}, {"files": None}, {"files": "a"}):
        plan = json.dumps({**tiny.plan(PLAN).to_json(), "measured": measured})
        refuse_seen_text([text], plan, "tiny", None)


def test_named_plans_know_their_text(tmp_path: Path) -> None:
    known = plan_record("fast", "smollm2-135m")
    assert known is not None
    (checksum,) = known["measured"]["files"]
    seen = Windows(torch.zeros(2, 8, dtype=torch.long), "fit.txt", frozenset([checksum]))
    with pytest.raises(TextError, match=r"was made with fit\.txt"):
        refuse_seen_text([seen], "fast", "smollm2-135m", None)
