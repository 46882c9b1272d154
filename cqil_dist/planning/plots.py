"""Plots of what planning measured, as PNG files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cqil_dist.planning.recover.training_state import TrainingLog

_SMOOTHED = 20


def plot_training(log: TrainingLog, path: Path) -> None:
    """Plot each step's loss, the running mean of these, and the loss on held-out text."""
    with _axes(path) as axes:
        losses = log.losses
        axes.plot(losses, color="#c9c9c9", linewidth=0.8, label="a step's windows")
        means = [fmean(losses[max(0, end - _SMOOTHED) : end]) for end in range(1, len(losses) + 1)]
        axes.plot(means, color="#4477aa", label=f"mean of {_SMOOTHED} steps")
        steps, held_out = zip(*log.held_out.items(), strict=True)
        axes.plot(steps, held_out, "o-", color="#cc3311", label="held-out text")
        axes.set(xlabel="step", ylabel="KL divergence, nats a token")
        axes.set_ylim(bottom=0)
        axes.legend()


def plot_similarity(record: dict[str, Any], path: Path) -> None:
    """Plot the cosine similarity of every two layers' inputs in an analysis (CQIL, figure 2)."""
    from numpy import array

    similarity = array(record["similarity"])
    with _axes(path, 5.5, 4.8) as axes:
        drawn = axes.imshow(similarity, cmap="viridis", vmin=max(0.0, similarity.min()), vmax=1)
        axes.figure.colorbar(drawn, label="cosine similarity")
        axes.set(xlabel="layer", ylabel="layer", title="Similarity of layers' inputs")


def plot_sensitivity(record: dict[str, Any], path: Path) -> None:
    """Plot the divergence that each group in an analysis causes by itself.

    There is a row for each size and bypass, and a column for each first layer.
    """
    from matplotlib.colors import LogNorm
    from numpy import full, nan

    entries = record["sensitivities"]
    kinds = sorted({(len(e["layers"]), str(e["bypass"])) for e in entries})
    layers = len(record["similarity"])
    kl = full((len(kinds), layers), nan)
    for e in entries:
        kl[kinds.index((len(e["layers"]), str(e["bypass"]))), e["layers"][0]] = max(e["kl"], 1e-4)
    with _axes(path, 9, 0.9 + 0.3 * len(kinds)) as axes:
        drawn = axes.imshow(kl, cmap="magma_r", norm=LogNorm(), aspect="auto")
        axes.figure.colorbar(drawn, label="KL, nats a token")
        axes.set_yticks(range(len(kinds)), [f"{size} layers, {bypass}" for size, bypass in kinds])
        how = "compensated" if record["compensation"] else "by itself"
        axes.set(xlabel="first layer", title=f"What a group costs {how}")


_KINDS = {
    "search": ("o-", "#4477aa"),
    "CQIL D0": ("s--", "#cc3311"),
    "CQIL D1": ("^--", "#ee7733"),
    "layers removed": ("x:", "#777777"),
}


def plot_pareto_front(record: dict[str, Any], path: Path) -> None:
    """Plot divergence against depth, a curve for each kind of plan in a search's record."""
    with _axes(path) as axes:
        for kind, (marks, colour) in _KINDS.items():
            # The original model diverges by 0, which a logarithmic axis cannot show.
            points = sorted(
                (each["depth"], each["kl"])
                for each in record["measured"]
                if each["kind"] == kind and each["kl"] > 1e-6
            )
            fitted = kind == "search" and record["compensation"]
            label = f"{kind}, compensated" if fitted else kind
            if points:
                axes.plot(
                    *zip(*points, strict=True), marks, color=colour, label=label, markersize=4
                )
        axes.set(xlabel="groups one after another", ylabel="KL divergence, nats a token")
        axes.set_yscale("log")
        axes.invert_xaxis()
        axes.legend()
        axes.set_title(record["model"])


@contextmanager
def _axes(path: Path, width: float = 7, height: float = 4.5) -> Iterator[Any]:
    """Give the axes of a new figure, and save the figure at the end of the block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
