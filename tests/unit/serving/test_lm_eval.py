"""lm-eval scores a task through the service as it does with transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.lm_eval_task import QUESTIONS, evaluate, local_tasks
from helpers.observed_engine import ObservedModel, serving
from helpers.served import MODEL, served
from helpers.tiny_models import TinyModelFactory


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return local_tasks(tmp_path, monkeypatch)


def test_a_task_scores_as_with_transformers(tiny_model: TinyModelFactory, tasks: Any) -> None:
    model = tiny_model()
    steps = ObservedModel(model, model.plan("sequential"), 4)
    with serving(model, steps) as engine, served(engine) as service:
        through_the_service = evaluate(
            tasks,
            "local-completions",
            model=MODEL,
            base_url=f"{service.addresses.http}/v1/completions",
            tokenizer=str(model.path),
            tokenizer_backend="huggingface",
            num_concurrent=2,
            max_length=engine.max_len,
        )
    original = evaluate(tasks, "hf", pretrained=str(model.path), dtype="float32", device="cpu")
    assert len(original) == len(QUESTIONS)
    for given, expected in zip(through_the_service, original, strict=True):
        assert [choice[0] for choice in given] == pytest.approx(
            [choice[0] for choice in expected], abs=1e-3
        )
        assert [choice[1] for choice in given] == [choice[1] for choice in expected]
