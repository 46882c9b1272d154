"""How far plans are from the original: as they are, or compensated; none is measured twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cqil_dist.plan import Group, Plan

if TYPE_CHECKING:
    from cqil_dist.planning.compensation import Compensation
    from cqil_dist.planning.original import Original


@dataclass(frozen=True)
class Divergence:
    """How far a changed model is from the original, on some text; means over its tokens.

    Attributes:
        kl: KL(original || changed) of the next token, nats.
        loss: the changed model's cross entropy on the text itself, nats.
    """

    kl: float
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


class Comparison:
    """Compares plans and single groups with the original on its text.

    Results are kept in a file, a line each as soon as it is made: what was interrupted goes on
    where it was. A line that was left unfinished is measured again.

    Attributes:
        original: what is compared with.
        fitting: compensates what is compared; None leaves it as it is.
    """

    def __init__(self, original: Original, fitting: Compensation | None, folder: Path) -> None:
        """Args: folder: of the results of one model and way of computing it."""
        self._folder = folder
        self.original = original
        self.fitting = fitting
        texts = [original.windows.digest]
        if fitting is not None:
            texts += [fitting.windows.digest, str(fitting.rank), str(fitting.ridge)]
        self._file = folder / f"compared-{'-'.join(texts)}.jsonl"
        self._known = _read(self._file)

    def compare(self, plan: Plan) -> Divergence:
        """Of a whole plan. Raises TextError where there is too little text to fit to."""

        def measure() -> Divergence:
            with self._compensated(plan.changed):
                return self.original.compare(plan)

        return self._once(plan.to_json(), measure)

    def compare_group(self, group: Group) -> Divergence:
        """Of one group, with every other layer as it is. Raises as `compare`."""

        def measure() -> Divergence:
            with self._compensated([group]):
                return self.original.compare_group(group)

        return self._once(group.to_json(), measure)

    def compare_layers(self, layers: Sequence[int]) -> Divergence:
        """Of these layers alone, one after another, the others left out; never compensated."""
        groups = [Group((layer,)) for layer in layers]
        return self._once({"kept": list(layers)}, lambda: self.original.compare_groups(groups))

    @property
    def uncompensated(self) -> Comparison:
        """Compares the same as it is."""
        return Comparison(self.original, None, self._folder) if self.fitting else self

    def _compensated(self, groups: Sequence[Group]) -> AbstractContextManager[object]:
        return self.fitting.of(groups) if self.fitting and groups else nullcontext()

    def _once(self, compared: dict[str, Any], measure: Callable[[], Divergence]) -> Divergence:
        key = json.dumps(compared)
        if key not in self._known:
            found = self._known[key] = measure()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"of": compared, "kl": found.kl, "loss": found.loss})
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}")  # a killed run may have left a line unfinished
        return self._known[key]


def _read(file: Path) -> dict[str, Divergence]:
    known: dict[str, Divergence] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                known[json.dumps(entry["of"])] = Divergence(entry["kl"], entry["loss"])
            except (ValueError, KeyError, TypeError):
                continue  # blank, or left unfinished
    return known
