"""What running a group concurrently costs, by itself: the KL divergence of every candidate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cqil_dist.plan import Bypass, Group
from cqil_dist.planning.original import Comparison
from cqil_dist.progress import Progress

Sensitivities = Mapping[Group, float]
"""KL(original || model with this one group), nats a token, by group."""


def candidates(num_layers: int, largest: int) -> Iterator[Group]:
    """Every group of 2 to `largest` layers with every bypass that differs from the others."""
    for first in range(num_layers - 1):
        for size in range(2, min(largest, num_layers - first) + 1):
            layers = tuple(range(first, first + size))
            for bypass in (*range(size), "full", "parallel"):
                yield Group(layers, Bypass.parse(bypass))


def measure_sensitivities(
    comparison: Comparison, groups: Sequence[Group], known: Path, progress: Progress
) -> dict[Group, float]:
    """Measure what is not known yet.

    Args:
        comparison: with the original.
        known: a file of earlier measurements on the same model and text, to which each new one is
            added as it is made: an interrupted run goes on where it was.
    """
    found = {group: kl for group, kl in _read(known) if group in set(groups)}
    missing = [group for group in groups if group not in found]
    known.parent.mkdir(parents=True, exist_ok=True)
    with (
        known.open("a", encoding="utf-8") as file,
        progress.task("Measuring groups", len(groups), "groups") as task,
    ):
        task.update(len(found))
        if known.stat().st_size:
            file.write("\n")  # after a line that a killed run left unfinished
        for group in missing:
            found[group] = comparison.compare_group(group).kl
            file.write(json.dumps({**group.to_json(), "kl": found[group]}) + "\n")
            file.flush()
            task.advance()
    return {group: found[group] for group in groups}


def best_bypasses(sensitivities: Sensitivities) -> dict[tuple[int, ...], Group]:
    """The least sensitive bypass of each run of layers."""
    best: dict[tuple[int, ...], Group] = {}
    for group, kl in sensitivities.items():
        if group.layers not in best or kl < sensitivities[best[group.layers]]:
            best[group.layers] = group
    return best


def _read(known: Path) -> Iterator[tuple[Group, float]]:
    if not known.is_file():
        return
    for line in known.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            yield Group(tuple(entry["layers"]), Bypass.parse(entry["bypass"])), entry["kl"]
        except (ValueError, KeyError):
            continue  # blank, or left unfinished
