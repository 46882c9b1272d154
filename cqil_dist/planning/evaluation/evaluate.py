"""A plan beside the original, on the same text and the same questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cqil_dist.errors import TextError
from cqil_dist.model.adapter import Adapter
from cqil_dist.plan import Plan
from cqil_dist.planning.evaluation.intervals import (
    Paired,
    compare_means,
    compare_perplexities,
    mean_of,
)
from cqil_dist.planning.evaluation.samples import PROMPTS, Sample, completion
from cqil_dist.planning.evaluation.scoring import (
    Encoded,
    Likelihood,
    encode,
    likelihoods,
    loss_by_window,
)
from cqil_dist.planning.evaluation.tasks import Task
from cqil_dist.planning.measure.grouped_model import grouped
from cqil_dist.planning.measure.measured_model import MeasuredModel
from cqil_dist.planning.measure.merging import merge
from cqil_dist.planning.measure.windows import Windows
from cqil_dist.records import headed, write_record

_ACCURACIES = ("acc", "acc_norm")


@dataclass(frozen=True)
class Subject:
    """What is scored: a text, a task, or several tasks.

    Attributes:
        items: what of it, such as "128 windows of 512 tokens".
        digest: of its tokens.
    """

    name: str
    items: str
    digest: str


@dataclass(frozen=True)
class Result:
    """One measure of both models.

    Attributes:
        measure: "perplexity", "acc" or "acc_norm".
    """

    measure: str
    of: Subject
    paired: Paired

    def to_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "of": self.of.name,
            "items": self.of.items,
            "digest": self.of.digest,
            **{name: asdict(interval) for name, interval in vars(self.paired).items()},
        }


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured of a plan.

    Attributes:
        setting: how it was computed.
    """

    model: str
    setting: dict[str, str]
    plan: Plan
    adapter: Path | None
    results: tuple[Result, ...]
    samples: tuple[Sample, ...]

    def to_json(self) -> dict[str, Any]:
        return headed(
            "evaluation",
            model=self.model,
            setting=self.setting,
            plan=self.plan.to_json(),
            adapter=None if self.adapter is None else str(self.adapter),
            results=[result.to_json() for result in self.results],
            samples=[asdict(sample) for sample in self.samples],
        )


def evaluate(
    measured: MeasuredModel,
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
    _check(texts, tasks)
    questions = [_Questions.of(task, measured) for task in tasks]
    original = _by_item(measured, texts, questions, measured.results)
    answers = [completion(measured, prompt) for prompt in prompts]
    merged = merge(measured.model, adapter)
    try:
        with grouped(measured.model, plan.groups):
            other = _by_item(measured, texts, questions, None)
            samples = [
                Sample(prompt, answer, completion(measured, prompt))
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
    finally:
        merged.undo()
    path = None if adapter is None else adapter.path
    results = _compared(original, other)
    return Evaluation(measured.name, measured.setting, plan, path, tuple(results), tuple(samples))


def _check(texts: Sequence[Windows], tasks: Sequence[Task]) -> None:
    counts = [(text.source, len(text.token_ids_WT)) for text in texts]
    counts += [(task.name, len(task.items)) for task in tasks]
    for name, count in counts:
        if count < 2:
            raise TextError(f"{name} has {count} item, but an interval takes 2 or more; give more")
        if [other for other, _ in counts].count(name) > 1:
            raise TextError(f"two texts or tasks are called {name}; rename one to tell them apart")


@dataclass(frozen=True)
class _Questions:
    """A task in the model's tokens, all of it such as it can score."""

    task: Task
    requests: list[Encoded]

    @classmethod
    def of(cls, task: Task, measured: MeasuredModel) -> _Questions:
        requests = [request for item in task.items for request in item.requests]
        most = measured.config.max_positions
        return cls(task, [encode(measured.tokenizer, each, most) for each in requests])

    @property
    def subject(self) -> Subject:
        count = f"{len(self.task.items)} questions"
        return Subject(self.task.name, count, _digest(repr(self.requests)))


# By measure, and text or task: of each window or question, a loss in nats, or 1 where it is right.
_ByItem = dict[tuple[str, Subject], list[float]]


def _by_item(
    measured: MeasuredModel,
    texts: Sequence[Windows],
    tasks: Sequence[_Questions],
    kept: Path | None,
) -> _ByItem:
    """Of the measured model as it is now.

    Args:
        kept: folder of earlier scores of this very model, which are not computed again.
    """
    model, progress = measured.model, measured.progress
    found: _ByItem = {}
    for text in texts:
        count, length = text.token_ids_WT.shape
        subject = Subject(text.source, f"{count} windows of {length} tokens", text.digest)
        losses = partial(loss_by_window, model, text, progress)
        found["perplexity", subject] = list(_once(kept, subject.digest, losses))
    for questions in tasks:
        task, subject = questions.task, questions.subject
        score = partial(likelihoods, model, questions.requests, progress, f"Scoring {task.name}")
        scores = (Likelihood(*each) for each in _once(kept, subject.digest, score))
        answered = [(item, [next(scores) for _ in item.requests]) for item in task.items]
        found["acc", subject] = [item.accuracy(each) for item, each in answered]
        found["acc_norm", subject] = [item.normalized_accuracy(each) for item, each in answered]
    return found


def _compared(original: _ByItem, other: _ByItem) -> list[Result]:
    """Perplexities, and accuracies with their means over tasks."""
    results: list[Result] = []
    for measure in ("perplexity", *_ACCURACIES):
        compare = compare_perplexities if measure == "perplexity" else compare_means
        scored = [
            Result(measure, of, compare(items, other[measure, of]))
            for (found, of), items in original.items()
            if found == measure
        ]
        results += scored
        if measure in _ACCURACIES and len(scored) > 1:
            paired = mean_of([each.paired for each in scored])
            results.append(Result(measure, _all_of([each.of for each in scored]), paired))
    return results


def _all_of(subjects: Sequence[Subject]) -> Subject:
    digest = _digest("".join(each.digest for each in subjects))
    return Subject(f"mean of {len(subjects)}", "tasks, each with the same weight", digest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _once(kept: Path | None, digest: str, score: Callable[[], Sequence[Any]]) -> Sequence[Any]:
    """Read from the folder what was scored before."""
    if kept is None:
        return score()
    file = kept / f"scored-{digest}.json"
    if not file.is_file():
        write_record(file, {"scores": score()})
    scores: list[Any] = json.loads(file.read_text(encoding="utf-8"))["scores"]
    return scores
