"""What was measured once on a model and a text, and is not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cqil_dist.plan import Group, Plan
from cqil_dist.planning.original import Comparison, Divergence


class Remembered:
    """Comparisons whose results are kept in a file, a line each as soon as it is made.

    What was interrupted goes on where it was; a line that was left unfinished is measured again.

    Args:
        comparison: makes those that are not known yet.
        file: of this comparison's digest alone.
    """

    def __init__(self, comparison: Comparison, file: Path) -> None:
        self._comparison = comparison
        self._file = file
        self._known = _read(file)

    @property
    def digest(self) -> str:
        return self._comparison.digest

    def compare(self, plan: Plan) -> Divergence:
        return self._once(plan.to_json(), lambda: self._comparison.compare(plan))

    def compare_group(self, group: Group) -> Divergence:
        return self._once(group.to_json(), lambda: self._comparison.compare_group(group))

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
            except (ValueError, KeyError):
                continue  # blank, or left unfinished
    return known
