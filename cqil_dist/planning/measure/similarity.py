"""How alike layers' inputs are, and plans chosen by that: what a search is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cqil_dist.plan import Bypass, Plan
from cqil_dist.planning.measure.baseline import Baseline


def input_similarity(baseline: Baseline) -> Tensor:
    """Cosine similarity of layers' inputs, mean over tokens: [L, L] (CQIL, section 3)."""
    layers = baseline.num_layers
    sums = torch.zeros(layers, layers)
    count = 0
    for states_L in baseline.states_WL:
        unit_LTD = F.normalize(torch.cat(states_L[:layers]).float(), dim=-1)
        sums += torch.einsum("ltd,mtd->lm", unit_LTD, unit_LTD).cpu()
        count += unit_LTD.shape[1]
    return sums / count


def regular_plan(similarity_LL: Tensor, size: int, depth: int, bypass: Bypass) -> Plan | None:
    """The paper's P S E plan of this depth whose groups' members have the most alike inputs.

    None where groups of `size` do not give that depth.
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
    """The layers that are left where those that change their input least are removed.

    That is ShortGPT's block influence (arXiv 2403.03853). The last layer, whose output is no
    layer's input, stays.
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
