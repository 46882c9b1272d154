"""Sensitivity: the KL divergence that running one group concurrently causes by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cqil_dist.plan import Bypass, Group
from cqil_dist.progress import Progress

if TYPE_CHECKING:
    from cqil_dist.planning.search.comparison import Comparison

Sensitivities = Mapping[Group, float]
"""KL(original || model with this one group) of each group, in nats a token."""


def candidates(num_layers: int, largest: int) -> Iterator[Group]:
    """Yield every group of 2 to `largest` layers, with each bypass that makes a difference."""
    for first in range(num_layers - 1):
        for size in range(2, min(largest, num_layers - first) + 1):
            layers = tuple(range(first, first + size))
            for bypass in (*range(size), "full", "parallel"):
                yield Group(layers, Bypass.parse(bypass))


def measure_sensitivities(
    comparison: Comparison, groups: Sequence[Group], progress: Progress
) -> dict[Group, float]:
    """Measure the KL divergence of each group by itself, in nats a token."""
    found: dict[Group, float] = {}
    with progress.task("Measuring groups", len(groups), "groups") as task:
        for group in groups:
            found[group] = comparison.compare_group(group).kl
            task.advance()
    return found


def groups_by_layers(sensitivities: Sensitivities) -> dict[tuple[int, ...], list[Group]]:
    """Return the groups of each run of layers, one for every bypass, the least sensitive first."""
    found: dict[tuple[int, ...], list[Group]] = {}
    for group in sorted(sensitivities, key=sensitivities.__getitem__):
        found.setdefault(group.layers, []).append(group)
    return found
