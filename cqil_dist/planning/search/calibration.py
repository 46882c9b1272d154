"""How groups and plans are measured on calibration text: for `analyze` and `search` alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cqil_dist.errors import ConfigError
from cqil_dist.planning.measure.compute_config import MAX_SEED
from cqil_dist.settings import check_settings, setting, whole

if TYPE_CHECKING:
    from cqil_dist.planning.measure.measured_model import MeasuredModel
    from cqil_dist.planning.measure.windows import Windows
    from cqil_dist.planning.search.analysis import Analysis
    from cqil_dist.planning.search.comparison import Comparison

_LARGEST_GROUP = 3


@dataclass(frozen=True)
class CalibrationConfig:
    """The settings that groups are measured with; the same let a search go on from an analysis.

    Raises:
        ConfigError: naming the field, its value and the rule.
    """

    text: list[Path] | None = setting(
        None, "Text file to measure on; again for more.", unset="text that the model itself says"
    )
    tokens: int = setting(2048, "Tokens of text to measure on.", whole(1))
    window: int = setting(256, "Tokens of a window of text.", whole(2))
    seed: int = setting(0, "Seed of the text that is sampled or chosen.", whole(0, MAX_SEED))
    max_group: int | None = setting(
        None,
        "Layers of the largest groups.",
        whole(2),
        unset=f"{_LARGEST_GROUP}, or 2 in a search for 2 ranks",
    )
    fit_tokens: int = setting(
        0,
        "Tokens of other text on which compensation (cqil plan compensate) is fitted before each "
        "group and plan is measured, such as 16384 for a model 576 wide; 0 measures them as they "
        "are.",
        whole(0),
    )

    def __post_init__(self) -> None:
        check_settings(self, ConfigError)

    def largest_group(self, ranks: int | None) -> int:
        """Return the most layers of a group to measure: by default, no more than there are ranks.

        A rank that held two of a group's layers would take about twice as long as the others, and
        these would wait for it.
        """
        if self.max_group is not None:
            return self.max_group
        return _LARGEST_GROUP if ranks is None else max(2, min(_LARGEST_GROUP, ranks))

    def measure(
        self, measured_model: MeasuredModel, ranks: int | None = None
    ) -> tuple[Comparison, Analysis]:
        """Measure every group by itself.

        Args:
            ranks: how many are to share the groups, if that is known.

        Returns:
            The comparison, which can measure whole plans as well, and the groups' analysis.

        Raises:
            TextError: the files cannot be read or hold too little text.
        """
        from cqil_dist.planning.search.analysis import analyze

        tokens = self.tokens + self.fit_tokens
        windows = measured_model.windows(self.text or [], self.window, tokens, self.seed)
        fitted = None
        if self.fit_tokens:
            fitted, windows = windows.split(max(1, self.tokens // self.window))
        comparison = _comparison(measured_model, windows, fitted)
        largest, progress = self.largest_group(ranks), measured_model.progress
        return comparison, analyze(measured_model.name, comparison, largest, progress)


def _comparison(
    measured_model: MeasuredModel, windows: Windows, fitted: Windows | None
) -> Comparison:
    """Make a comparison on `windows`, compensated on the text `fitted` where there is one."""
    from cqil_dist.planning.measure.baseline import Baseline
    from cqil_dist.planning.recover.compensation import Compensation
    from cqil_dist.planning.search.comparison import Comparison

    model, progress = measured_model.model, measured_model.progress
    compensation = None if fitted is None else Compensation(model, fitted, progress)
    return Comparison(Baseline(model, windows, progress), compensation, measured_model.results)
