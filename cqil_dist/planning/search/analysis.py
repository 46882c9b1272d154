"""Which layers could run together: how alike their inputs are, and what each group costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cqil_dist.plan import Group
from cqil_dist.planning.measure.similarity import input_similarity
from cqil_dist.planning.search.comparison import Comparison
from cqil_dist.planning.search.sensitivity import candidates, measure_sensitivities
from cqil_dist.progress import Progress
from cqil_dist.records import headed


@dataclass(frozen=True)
class Analysis:
    """A model on one calibration text.

    Attributes:
        comparison: how groups were compared with the original.
        similarity_LL: cosine similarity of layers' inputs.
        sensitivities: KL divergence of each group by itself, nats a token.
    """

    model: str
    comparison: Comparison
    similarity_LL: Tensor
    sensitivities: dict[Group, float]

    def to_json(self) -> dict[str, Any]:
        return headed(
            "analysis",
            model=self.model,
            **self.comparison.to_json(),
            similarity=[[round(v, 5) for v in row] for row in self.similarity_LL.tolist()],
            sensitivities=[
                {**group.to_json(), "kl": kl} for group, kl in self.sensitivities.items()
            ],
        )


def analyze(model: str, comparison: Comparison, largest: int, progress: Progress) -> Analysis:
    """Measure a model on the text of a comparison.

    Args:
        model: what the user calls it.
        largest: layers of the largest groups.
    """
    baseline = comparison.baseline
    groups = list(candidates(baseline.num_layers, largest))
    return Analysis(
        model,
        comparison,
        input_similarity(baseline),
        measure_sensitivities(comparison, groups, progress),
    )
