"""How much memory a rank's share of a model takes, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cqil_dist.assignment import Assignment
from cqil_dist.model.config import ModelConfig


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank's weights, and of its KV cache for each token it has room for."""

    weight_bytes: int
    kv_bytes_per_token: int

    def total(self, tokens: int) -> int:
        """Bytes with room for `tokens` tokens over all slots."""
        return self.weight_bytes + tokens * self.kv_bytes_per_token


def footprint(
    assignments: Sequence[Assignment],
    rank: int,
    config: ModelConfig,
    dtype: str,
    *,
    adapted: bool = False,
) -> Footprint:
    """What `rank` holds in `dtype`: "float32", "float16" or "bfloat16".

    Plans that have it compute the same pieces together share them.

    Args:
        adapted: the first plan has an adapter, hence weights of its own.
    """
    bytes_per_value = 4 if dtype == "float32" else 2
    stages = [
        (adapted and index == 0, stage)
        for index, assignment in enumerate(assignments)
        for stage in assignment.stages
    ]
    attentions = {(changed, stage.attention_bundles(rank)) for changed, stage in stages}
    feed_forwards = {
        (changed, bundle)
        for changed, stage in stages
        for bundle in stage.feed_forward_bundles(rank)
    }
    caches = {stage.pieces[rank] for _, stage in stages}
    attention_layers = sum(len(bundle) for _, bundles in attentions for bundle in bundles)
    feed_forward_layers = sum(len(bundle) for _, bundle in feed_forwards)
    weights = len(assignments[0].head_rows[rank]) * config.hidden_size
    weights += attention_layers * config.attention_parameters
    weights += feed_forward_layers * config.feed_forward_parameters
    kv_values = sum(len(pieces) for pieces in caches) * config.kv_values_per_token
    return Footprint(bytes_per_value * weights, bytes_per_value * kv_values)
