"""A plan beside the original, on the same text and the same questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cqil_dist.errors import TextError
from cqil_dist.model.adapter import Adapter
from cqil_dist.plan import Plan
from cqil_dist.planning.evaluation.intervals import (
    Paired,
    compare_means,
    compare_perplexities,
    mean_of,
)
from cqil_dist.planning.evaluation.scoring import Encoded, encode, likelihoods, loss_by_window
from cqil_dist.planning.evaluation.tasks import Task
from cqil_dist.planning.grouped_model import grouped
from cqil_dist.planning.merging import merge
from cqil_dist.planning.records import write_record
from cqil_dist.planning.study import Study
from cqil_dist.planning.texts import Windows

PROMPTS = (
    "The capital of France is",
    "Once upon a time, a lighthouse keeper",
    "To make bread, you first",
    "Water boils at a temperature of",
)
_COMPLETION_TOKENS = 40
_MEASURES = ("acc", "acc_norm")


@dataclass(frozen=True)
class Result:
    """One measure of both models.

    Attributes:
        measure: "perplexity", "acc" or "acc_norm".
        of: the text or the task.
        items: windows or questions.
    """

    measure: str
    of: str
    items: int
    paired: Paired

    def to_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "of": self.of,
            "items": self.items,
            **{name: asdict(interval) for name, interval in vars(self.paired).items()},
        }


@dataclass(frozen=True)
class Sample:
    """What both models say after a prompt, greedily."""

    prompt: str
    original: str
    other: str


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured of a plan."""

    model: str
    plan: Plan
    adapter: Path | None
    results: tuple[Result, ...]
    samples: tuple[Sample, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "record": "evaluation",
            "model": self.model,
            "plan": self.plan.to_json(),
            "adapter": None if self.adapter is None else str(self.adapter),
            "results": [result.to_json() for result in self.results],
            "samples": [asdict(sample) for sample in self.samples],
        }


def evaluate(
    study: Study,
    plan: Plan,
    adapter: Adapter | None,
    texts: Sequence[Windows],
    tasks: Sequence[Task],
    prompts: Sequence[str] = PROMPTS,
) -> Evaluation:
    """Score the original, once for each text and task, and the plan with its adapter.

    Raises:
        TextError: a text or task has but one item, which says nothing of how sure a score is; two
            have the same name; a task's continuation cannot be scored.
    """
    counts = [(text.source, len(text.token_ids_WT)) for text in texts]
    counts += [(task.name, len(task.items)) for task in tasks]
    for name, count in counts:
        if count < 2:
            raise TextError(f"{name} has {count} item, but an interval takes 2 or more; give more")
        if [other for other, _ in counts].count(name) > 1:
            raise TextError(f"two texts or tasks are called {name}; rename one to tell them apart")
    asked = _Asked(texts, [_Questions.of(task, study) for task in tasks], prompts)
    original = _score(study, asked, study.folder / study.numerics)
    merged = merge(study.model, adapter)
    try:
        with grouped(study.model, plan.groups):
            other = _score(study, asked, None)
    finally:
        merged.undo()
    results = [
        Result("perplexity", text.source, len(text.token_ids_WT), compare_perplexities(a, b))
        for text, a, b in zip(texts, original.losses, other.losses, strict=True)
    ]
    for measure in _MEASURES:
        pairs = zip(original.accuracies[measure], other.accuracies[measure], strict=True)
        scored = [
            Result(measure, task.name, len(task.items), compare_means(a, b))
            for task, (a, b) in zip(tasks, pairs, strict=True)
        ]
        results += scored
        if len(scored) > 1:
            items = sum(each.items for each in scored)
            paired = mean_of([each.paired for each in scored])
            results.append(Result(measure, f"mean of {len(scored)}", items, paired))
    said = zip(prompts, original.said, other.said, strict=True)
    path = None if adapter is None else adapter.path
    samples = tuple(Sample(*each) for each in said)
    return Evaluation(study.name, plan, path, tuple(results), samples)


@dataclass(frozen=True)
class _Questions:
    """A task, and its continuations in the model's tokens, all of them ones that it can score."""

    task: Task
    encoded: list[Encoded]

    @classmethod
    def of(cls, task: Task, study: Study) -> _Questions:
        asked = [each for item in task.items for each in item.asked]
        most = study.config.max_positions
        return cls(task, [encode(study.tokenizer, each, most) for each in asked])


@dataclass(frozen=True)
class _Asked:
    """What both models are scored on."""

    texts: Sequence[Windows]
    tasks: Sequence[_Questions]
    prompts: Sequence[str]


@dataclass(frozen=True)
class _Scores:
    """One model's: losses by text and window, accuracies by measure, task and item; answers."""

    losses: list[list[float]]
    accuracies: dict[str, list[list[float]]]
    said: list[str]


def _score(study: Study, asked: _Asked, kept: Path | None) -> _Scores:
    """Of the study's model as it is now.

    Args:
        kept: folder of earlier scores of this very model, which are not computed again.
    """
    scores = _Scores([], {measure: [] for measure in _MEASURES}, [])
    for text in asked.texts:
        scores.losses.append(_once(kept, text.digest, partial(_losses, study, text)))
    for questions in asked.tasks:
        found = _once(kept, questions.task.digest, partial(_accuracies, study, questions))
        for measure in _MEASURES:
            scores.accuracies[measure].append(found[measure])
    scores.said.extend(_completion(study, prompt) for prompt in asked.prompts)
    return scores


def _losses(study: Study, text: Windows) -> list[float]:
    return loss_by_window(study.model, text, study.progress)


def _accuracies(study: Study, questions: _Questions) -> dict[str, list[float]]:
    """By measure and item."""
    task = questions.task
    found = likelihoods(study.model, questions.encoded, study.progress, f"Scoring {task.name}")
    answers = iter(found)
    answered = [(item, [next(answers) for _ in item.asked]) for item in task.items]
    return {
        "acc": [item.accuracy(each) for item, each in answered],
        "acc_norm": [item.normalized_accuracy(each) for item, each in answered],
    }


def _once(kept: Path | None, digest: str, score: Callable[[], Any]) -> Any:
    """Read from the folder what was scored before."""
    if kept is None:
        return score()
    file = kept / f"scored-{digest}.json"
    if not file.is_file():
        write_record(file, {"scores": score()})
    return json.loads(file.read_text(encoding="utf-8"))["scores"]


@torch.inference_mode()
def _completion(study: Study, prompt: str) -> str:
    ids: Any = study.tokenizer(prompt)["input_ids"]
    given = torch.tensor([ids], device=study.device)
    said = study.model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=_COMPLETION_TOKENS,
        do_sample=False,
    )
    text = study.tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True)
    return str(text)
