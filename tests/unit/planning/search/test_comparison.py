"""No plan or group is measured twice, even if the run was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.planning_cases import fresh, random_windows
from helpers.tiny_models import TinyModel

from cqil_dist.plan import Group, Plan
from cqil_dist.planning.measure.baseline import Baseline, Divergence
from cqil_dist.planning.search.comparison import Comparison
from cqil_dist.planning.search.sensitivity import candidates, measure_sensitivities
from cqil_dist.progress import SilentProgress


@pytest.fixture
def baseline(tiny: TinyModel) -> Baseline:
    return Baseline(fresh(tiny), random_windows(3, 1, 20), SilentProgress())


def test_an_interrupted_measurement_goes_on(
    baseline: Baseline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = list(candidates(6, 2))
    plan = Plan.covering([groups[7]], 6)
    first = measure_sensitivities(
        Comparison(baseline, None, tmp_path), groups[:5], SilentProgress()
    )
    (known,) = tmp_path.iterdir()
    with known.open("a", encoding="utf-8") as file:
        file.write('\n{"of": {"layers": [3, 4], "byp')  # killed while it wrote

    computed: list[object] = []
    compare = baseline.compare

    def watched(groups: Sequence[Group]) -> Divergence:
        computed.append(groups)
        return compare(groups)

    monkeypatch.setattr(baseline, "compare", watched)
    found = measure_sensitivities(Comparison(baseline, None, tmp_path), groups, SilentProgress())
    assert len(computed) == len(groups) - 5
    assert {group: found[group] for group in groups[:5]} == first
    for _ in range(2):
        comparison = Comparison(baseline, None, tmp_path)
        assert measure_sensitivities(comparison, groups, SilentProgress()) == found
        assert comparison.compare(plan).kl == pytest.approx(found[groups[7]])
    assert len(computed) == len(groups) - 5 + 1, "the plan, once"
