"""On which text plans are chosen, and how: what `analyze` and `search` have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cqil_dist.planning.analysis import Analysis
    from cqil_dist.planning.comparison import Comparison
    from cqil_dist.planning.study import Study

_LARGEST_GROUP = 3


@dataclass(frozen=True)
class CalibrationConfig:
    """How to measure. The same values let a search go on from an analysis.

    Attributes:
        text: files; none for text that the model itself says.
        tokens: how much text to measure on.
        window: tokens of a window of it.
        seed: of the text that is sampled or chosen.
        max_group: layers of the largest groups; None for 3, or as many as ranks are to share them.
        fit_tokens: other text that compensation is fitted on before anything is measured; 0 to
            measure groups and plans as they are.
    """

    text: list[Path] | None = None
    tokens: int = 2048
    window: int = 256
    seed: int = 0
    max_group: int | None = None
    fit_tokens: int = 0

    def largest_group(self, ranks: int | None) -> int:
        """In layers. A rank with two of a group's layers computes them one after the other."""
        if self.max_group is not None:
            return self.max_group
        return _LARGEST_GROUP if ranks is None else max(2, min(_LARGEST_GROUP, ranks))

    def measure(self, study: Study, ranks: int | None = None) -> tuple[Comparison, Analysis]:
        """Every group by itself; and how whole plans are measured.

        Args:
            ranks: that are to share the groups, where that is known.

        Raises:
            TextError: the files cannot be read or hold too little.
        """
        from cqil_dist.planning.analysis import analyze

        tokens = self.tokens + self.fit_tokens
        fitted, windows = None, study.windows(self.text or [], self.window, tokens, self.seed)
        if self.fit_tokens:
            fitted, windows = windows.split(max(1, self.tokens // self.window))
        comparison = study.comparison(windows, fitted)
        return comparison, analyze(
            study.name, comparison, self.largest_group(ranks), study.progress
        )
