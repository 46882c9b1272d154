"""Scoring a plan and the original model on the same text and the same questions."""

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
    """A text, a task, or several tasks, on which models are scored.

    Attributes:
        items: what is taken of it, such as "128 windows of 512 tokens".
        digest: checksum of its tokens.
    """

    name: str
    items: str
    digest: str


@dataclass(frozen=True)
class Result:
    """A measure of the original model and of the plan.

    Attributes:
        measure: "perplexity", "acc" or "acc_norm".
        of: the text or task that was scored.
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
    """The result of an evaluation.

    Attributes:
        setting: the device, precision and programs' versions that it was computed with.
        adapter: the directory of the plan's adapter.
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
    measured_model: MeasuredModel,
    plan: Plan,
    adapter: Adapter | None,
    texts: Sequence[Windows],
    tasks: Sequence[Task],
    prompts: Sequence[str] = PROMPTS,
) -> Evaluation:
    """Score the original model and the plan, with its adapter, on texts and tasks.

    The original model's scores are kept in the cache, and not computed again for another plan.

    Raises:
        TextError: a text or task has a single item, which gives no interval; two have the same
            name; or a continuation in a task cannot be scored.
    """
    _check(texts, tasks)
    model = measured_model.model
    questions = [_Questions.of(task, measured_model) for task in tasks]
    original = _by_item(measured_model, texts, questions, measured_model.results)
    answers = [completion(measured_model, prompt) for prompt in prompts]
    merged = merge(model, adapter)
    try:
        with grouped(model, plan.groups):
            other = _by_item(measured_model, texts, questions, None)
            samples = [
                Sample(prompt, answer, completion(measured_model, prompt))
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
    finally:
        merged.undo()
    name, setting = measured_model.name, measured_model.setting
    path = None if adapter is None else adapter.path
    results = _compared(original, other)
    return Evaluation(name, setting, plan, path, tuple(results), tuple(samples))


def _check(texts: Sequence[Windows], tasks: Sequence[Task]) -> None:
    counts = [(text.source, len(text.token_ids_WT)) for text in texts]
    counts += [(task.name, len(task.items)) for task in tasks]
    for name, count in counts:
        if count < 2:
            raise TextError(f"{name} has {count} item, but an interval takes 2 or more; add items")
        if [other for other, _ in counts].count(name) > 1:
            raise TextError(f"two texts or tasks are called {name}; rename one to tell them apart")


@dataclass(frozen=True)
class _Questions:
    """A task in the model's tokens, all of which the model can score."""

    task: Task
    requests: list[Encoded]

    @classmethod
    def of(cls, task: Task, measured_model: MeasuredModel) -> _Questions:
        tokenizer, max_len = measured_model.tokenizer, measured_model.config.max_positions
        requests = [request for item in task.items for request in item.requests]
        return cls(task, [encode(tokenizer, each, max_len) for each in requests])

    @property
    def subject(self) -> Subject:
        count = f"{len(self.task.items)} questions"
        return Subject(self.task.name, count, _digest(repr(self.requests)))


# For each measure and text or task, one number an item: a window's loss in nats a token, or 1 for a
# question that is answered right and 0 for one that is not.
_ByItem = dict[tuple[str, Subject], list[float]]


def _by_item(
    measured_model: MeasuredModel,
    texts: Sequence[Windows],
    tasks: Sequence[_Questions],
    cache: Path | None,
) -> _ByItem:
    """Score the model as it is now, with or without a plan and an adapter.

    Args:
        cache: folder of the same model's earlier scores; None where scores are not kept.
    """
    model, progress = measured_model.model, measured_model.progress
    found: _ByItem = {}
    for text in texts:
        count, length = text.token_ids_WT.shape
        subject = Subject(text.source, f"{count} windows of {length} tokens", text.digest)
        losses = partial(loss_by_window, model, text, progress)
        found["perplexity", subject] = list(_once(cache, subject.digest, losses))
    for questions in tasks:
        task, subject = questions.task, questions.subject
        score = partial(likelihoods, model, questions.requests, progress, f"Scoring {task.name}")
        scores = (Likelihood(*each) for each in _once(cache, subject.digest, score))
        answered = [(item, [next(scores) for _ in item.requests]) for item in task.items]
        found["acc", subject] = [item.accuracy(each) for item, each in answered]
        found["acc_norm", subject] = [item.normalized_accuracy(each) for item, each in answered]
    return found


def _compared(original: _ByItem, other: _ByItem) -> list[Result]:
    """Return the results: perplexities, then accuracies, each with its mean over the tasks."""
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


def _once(cache: Path | None, digest: str, score: Callable[[], Sequence[Any]]) -> Sequence[Any]:
    """Return the scores in the cache, where they are computed and kept if they are missing."""
    if cache is None:
        return score()
    file = cache / f"scored-{digest}.json"
    if not file.is_file():
        write_record(file, {"scores": score()})
    scores: list[Any] = json.loads(file.read_text(encoding="utf-8"))["scores"]
    return scores
