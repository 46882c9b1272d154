"""Similarity of layers' inputs, and the published ways to choose layers by it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cqil_dist.plan import Bypass, Plan
from cqil_dist.planning.measure.baseline import Baseline


def input_similarity(baseline: Baseline) -> Tensor:
    """Measure layer inputs' cosine similarity [L, L], averaged over tokens (CQIL, section 3)."""
    layers = baseline.num_layers
    sums = torch.zeros(layers, layers)
    count = 0
    for states_L in baseline.states_WL:
        unit_LTD = F.normalize(torch.cat(states_L[:layers]).float(), dim=-1)
        sums += torch.einsum("ltd,mtd->lm", unit_LTD, unit_LTD).cpu()
        count += unit_LTD.shape[1]
    return sums / count


def regular_plan(similarity_LL: Tensor, size: int, depth: int, bypass: Bypass) -> Plan | None:
    """Find the regular plan of this depth whose groups' inputs are most similar (CQIL's P, S, E).

    Return None where no number of groups of `size` layers gives that depth.
    """
    layers = len(similarity_LL)
    groups, left = divmod(layers - depth, size - 1)
    if left or groups < 1 or groups * size > layers:
        return None
    spans = [
        Plan.span(size, start, start + groups * size, bypass, layers)
        for start in range(layers - groups * size + 1)
    ]
    return max(spans, key=lambda plan: _mean_similarity(similarity_LL, plan))


def without_layers(similarity_LL: Tensor, depth: int) -> list[int]:
    """Return the `depth` layers that remain when those that change their input least are removed.

    This is ShortGPT's block influence (arXiv 2403.03853). The last layer always stays, since its
    output is no layer's input.
    """
    influence = 1 - similarity_LL.diagonal(offset=1)
    layers = len(similarity_LL)
    removed = set(influence.argsort()[: layers - depth].tolist())
    return [layer for layer in range(layers) if layer not in removed]


def _mean_similarity(similarity_LL: Tensor, plan: Plan) -> float:
    pairs = [
        float(similarity_LL[a, b])
        for group in plan.groups
        for a in group.layers
        for b in group.layers
        if a < b
    ]
    return sum(pairs) / len(pairs)
