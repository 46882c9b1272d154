"""A local task for lm-eval, and lm-eval's scores of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

QUESTIONS = (
    {"question": "The capital of France is", "choices": ["Paris", "bread", "the sea"], "gold": 0},
    {"question": "The harbour lies by", "choices": ["fish", "the sea", "news"], "gold": 1},
    {"question": "Every morning the keeper", "choices": ["walks", "of the", "is Paris"], "gold": 0},
    {"question": "to buy bread, fish and", "choices": ["the town", "lies", "the news"], "gold": 2},
)
TASK = """
task: harbour
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def local_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A task manager of lm-eval that has the local task and asks no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(question) for question in QUESTIONS), encoding="utf-8")
    (tmp_path / "harbour.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluate(tasks: Any, kind: str, **arguments: Any) -> list[list[tuple[float, bool]]]:
    """lm-eval's log likelihood of each question's choices, and whether each is the greedy one."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=["harbour"],
        task_manager=tasks,
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["harbour"], key=lambda sample: int(sample["doc_id"]))
    return [
        [(float(choice[0]), str(choice[1]) == "True") for choice in sample["filtered_resps"]]
        for sample in samples
    ]
