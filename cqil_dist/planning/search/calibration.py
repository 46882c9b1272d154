"""On which text plans are chosen, and how: what `analyze` and `search` have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cqil_dist.planning.measure.measured_model import MeasuredModel
    from cqil_dist.planning.measure.windows import Windows
    from cqil_dist.planning.search.analysis import Analysis
    from cqil_dist.planning.search.comparison import Comparison

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
        """Layers of the largest groups to measure: more than there are ranks would share a rank."""
        if self.max_group is not None:
            return self.max_group
        return _LARGEST_GROUP if ranks is None else max(2, min(_LARGEST_GROUP, ranks))

    def measure(
        self, measured: MeasuredModel, ranks: int | None = None
    ) -> tuple[Comparison, Analysis]:
        """Every group by itself; and how whole plans are measured.

        Args:
            ranks: that are to share the groups, where that is known.

        Raises:
            TextError: the files cannot be read or hold too little.
        """
        from cqil_dist.planning.search.analysis import analyze

        tokens = self.tokens + self.fit_tokens
        fitted, windows = None, measured.windows(self.text or [], self.window, tokens, self.seed)
        if self.fit_tokens:
            fitted, windows = windows.split(max(1, self.tokens // self.window))
        comparison = _comparison(measured, windows, fitted)
        return comparison, analyze(
            measured.name, comparison, self.largest_group(ranks), measured.progress
        )


def _comparison(measured: MeasuredModel, windows: Windows, fitted: Windows | None) -> Comparison:
    """Compares plans with the original on `windows`, compensated by text to fit to, if any."""
    from cqil_dist.planning.measure.baseline import Baseline
    from cqil_dist.planning.recover.compensation import Compensation
    from cqil_dist.planning.search.comparison import Comparison

    baseline = Baseline(measured.model, windows, measured.progress)
    compensation = None
    if fitted is not None:
        compensation = Compensation(measured.model, fitted, measured.progress)
    return Comparison(baseline, compensation, measured.results)
