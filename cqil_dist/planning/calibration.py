"""On which text plans are chosen, and how: what `analyze` and `search` have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cqil_dist.planning.analysis import Analysis
    from cqil_dist.planning.comparison import Comparison
    from cqil_dist.planning.study import Study


@dataclass(frozen=True)
class CalibrationConfig:
    """How to measure. The same values let a search go on from an analysis.

    Attributes:
        text: files; none for text that the model itself says.
        tokens: how much text to measure on.
        window: tokens of a window of it.
        seed: of the text that is sampled or chosen.
        max_group: layers of the largest groups.
        fit_tokens: other text that compensation is fitted on before anything is measured; 0 to
            measure groups and plans as they are.
    """

    text: list[Path] | None = None
    tokens: int = 2048
    window: int = 256
    seed: int = 0
    max_group: int = 3
    fit_tokens: int = 0

    def measure(self, study: Study) -> tuple[Comparison, Analysis]:
        """Every group by itself; and how whole plans are measured.

        Raises:
            TextError: the files cannot be read or hold too little.
        """
        from cqil_dist.planning.analysis import analyze

        tokens = self.tokens + self.fit_tokens
        fitted, windows = None, study.windows(self.text or [], self.window, tokens, self.seed)
        if self.fit_tokens:
            fitted, windows = windows.split(max(1, self.tokens // self.window))
        comparison = study.comparison(windows, fitted)
        return comparison, analyze(study.name, comparison, self.max_group, study.progress)
