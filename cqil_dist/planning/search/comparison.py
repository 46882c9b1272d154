"""Comparing plans with the original model, as they are or compensated; none is measured twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cqil_dist.plan import Group, Plan
from cqil_dist.planning.measure.baseline import Divergence

if TYPE_CHECKING:
    from cqil_dist.planning.measure.baseline import Baseline
    from cqil_dist.planning.recover.compensation import Compensation


class Comparison:
    """Compares plans and single groups with the original model on one text.

    Each result is at once written to a file, as a line of its own, so that interrupted measurements
    resume; what an unfinished line stood for is measured again.

    Attributes:
        baseline: the original model on the text.
        compensation: fits the changes that plans are measured with; None for plans as they are.
    """

    def __init__(self, baseline: Baseline, compensation: Compensation | None, folder: Path) -> None:
        """Keep results in `folder`, which is for this model, device and precision alone."""
        self._folder = folder
        self.baseline = baseline
        self.compensation = compensation
        texts = [baseline.windows.digest]
        if compensation is not None:
            texts += [compensation.windows.digest, str(compensation.rank), str(compensation.ridge)]
        self._file = folder / f"compared-{'-'.join(texts)}.jsonl"
        self._known = _read(self._file)

    def compare(self, plan: Plan) -> Divergence:
        """Measure a plan's divergence. Raises TextError if the text to fit to is too short."""
        return self._once(plan.to_json(), plan.groups, plan.changed)

    def compare_group(self, group: Group) -> Divergence:
        """Measure a group's divergence, all other layers being exact. Raises as `compare`."""
        whole = Plan.covering([group], self.baseline.num_layers)
        return self._once(group.to_json(), whole.groups, [group])

    def compare_layers(self, layers: Sequence[int]) -> Divergence:
        """Measure the divergence of the model with these layers alone; it is never compensated."""
        return self._once({"kept": list(layers)}, [Group((layer,)) for layer in layers], [])

    @property
    def uncompensated(self) -> Comparison:
        """Return a comparison on the same text that measures plans as they are."""
        return Comparison(self.baseline, None, self._folder) if self.compensation else self

    def to_json(self) -> dict[str, Any]:
        """Return what a record says of the text and of the compensation."""
        return {
            **self.baseline.windows.to_json(),
            "perplexity": self.baseline.perplexity,
            "compensation": self.compensation and self.compensation.to_json(),
        }

    def _once(
        self, compared: dict[str, Any], groups: Sequence[Group], compensated: Sequence[Group]
    ) -> Divergence:
        key = json.dumps(compared)
        if key not in self._known:
            with self._applied(compensated):
                found = self._known[key] = self.baseline.compare(groups)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"of": compared, "kl": found.kl, "loss": found.loss})
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}")  # after a newline: a killed run may have left half a line
        return self._known[key]

    def _applied(self, groups: Sequence[Group]) -> AbstractContextManager[object]:
        return nullcontext() if self.compensation is None else self.compensation.applied(groups)


def _read(file: Path) -> dict[str, Divergence]:
    known: dict[str, Divergence] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                known[json.dumps(entry["of"])] = Divergence(entry["kl"], entry["loss"])
            except (ValueError, KeyError, TypeError):
                continue  # a blank line, or an unfinished one
    return known
