"""Tasks in files of JSON lines: multiple choice, a choice of contexts, or the last word.

    {"context": ..., "choices": [...], "gold": i}
    {"contexts": [...], "continuation": ..., "gold": i}
    {"context": ..., "continuation": ...}

Choices and continuations begin with the blank that separates them from the context.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqil_dist.errors import TextError
from cqil_dist.planning.evaluation.scoring import Likelihood, Request


@dataclass(frozen=True)
class Item:
    """A question of a task.

    Attributes:
        requests: the continuations to choose from, each with its context.
        gold: index of the right one; None if there is only one, which greedy decoding has to give.
    """

    requests: tuple[Request, ...]
    gold: int | None

    def accuracy(self, found: Sequence[Likelihood]) -> float:
        """Return 1 if the most likely continuation is right, else 0 (lm-eval's `acc`)."""
        if self.gold is None:
            return float(found[0].greedy)
        return float(_best([each.logprob for each in found]) == self.gold)

    def normalized_accuracy(self, found: Sequence[Likelihood]) -> float:
        """Return 1 if the likeliest one per character is right, else 0 (lm-eval's `acc_norm`)."""
        if self.gold is None:
            return self.accuracy(found)
        lengths = [len(each.continuation.lstrip()) for each in self.requests]
        scores = [each.logprob / length for each, length in zip(found, lengths, strict=True)]
        return float(_best(scores) == self.gold)


@dataclass(frozen=True)
class Task:
    """A named list of questions."""

    name: str
    items: tuple[Item, ...]


def read_task(path: Path, limit: int | None = None) -> Task:
    """Read the task in a file, or its first `limit` items.

    Raises:
        TextError: the file cannot be read or holds no item, or a line has none of the three forms.
    """
    try:
        # Not splitlines, which also splits at Unicode line ends; JSON strings may hold those.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read a task from {path}: {error}") from error
    items: list[Item] = []
    written = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in written[:limit]:
        try:
            items.append(_item(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TextError(
                f"{path}, line {number}: not an item of a task ({error!r}); items are "
                '{"context", "choices", "gold"}, {"contexts", "continuation", "gold"} or '
                '{"context", "continuation"}'
            ) from error
    if not items:
        raise TextError(f"{path} holds no item; a task has one a line")
    return Task(path.stem, tuple(items))


def _item(entry: Any) -> Item:
    if "choices" in entry:
        context = _text(entry["context"])
        requests = tuple(Request(context, _text(choice)) for choice in _list(entry["choices"]))
    elif "contexts" in entry:
        continuation = _text(entry["continuation"])
        requests = tuple(Request(_text(each), continuation) for each in _list(entry["contexts"]))
    else:
        return Item((Request(_text(entry["context"]), _text(entry["continuation"])),), None)
    if not all(each.continuation.strip() for each in requests):
        raise ValueError("a choice is blank")
    gold = entry["gold"]
    if type(gold) is not int or not 0 <= gold < len(requests):
        raise ValueError(f"gold is {gold!r} of {len(requests)}")
    return Item(requests, gold)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
