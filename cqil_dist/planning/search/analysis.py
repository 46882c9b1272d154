"""Which layers could run concurrently: similarity of their inputs, and each group's divergence."""

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
    """A model's layers and groups, measured on one calibration text.

    Attributes:
        model: the model's name or path, as the user gave it.
        comparison: how groups were compared with the original model.
        similarity_LL: cosine similarity of every two layers' inputs, [L, L].
        sensitivities: KL divergence of each group by itself, in nats a token.
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
    """Measure a model's layers and groups on the text of a comparison.

    Args:
        model: the model's name or path, as the user gave it.
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
