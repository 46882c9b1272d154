"""How much memory a rank's share of a model takes, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cqil_dist.assignment import Assignment, Bundle
from cqil_dist.costs import Piece
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.precision import Precision


@dataclass(frozen=True)
class Footprint:
    """The bytes of a rank's weights, and of its KV cache for each token it has room for."""

    weight_bytes: int
    kv_bytes_per_token: int

    def total(self, tokens: int) -> int:
        """Return the bytes with room for `tokens` tokens over all slots."""
        return self.weight_bytes + tokens * self.kv_bytes_per_token


def footprint(
    assignments: Sequence[Assignment],
    rank: int,
    config: ModelConfig,
    precision: Precision,
    *,
    adapted: bool = False,
) -> Footprint:
    """Sum up what `rank` holds, over all pieces that it computes.

    Plans that have it compute the same pieces together share them.

    Args:
        adapted: the first plan has an adapter, hence weights of its own.
    """
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
    rows = len(assignments[0].head_rows[rank])
    weight_bytes = precision.weight_format.nbytes(rows, config.hidden_size)
    weight_bytes += sum(_attention_bytes(each, config, precision) for _, each in attentions)
    weight_bytes += sum(_feed_forward_bytes(each, config, precision) for _, each in feed_forwards)
    kv_values = sum(config.shape.kv_values(piece.heads) for held in caches for piece in held)
    return Footprint(weight_bytes, kv_values * precision.kv_dtype.itemsize)


def _attention_bytes(bundles: Sequence[Bundle], config: ModelConfig, precision: Precision) -> int:
    """Count the bytes of one attention part; the gain of the norm before it is folded in."""
    weights, shape = precision.weight_format, config.shape
    pieces = [piece for bundle in bundles for piece in bundle]
    qkv = sum(shape.qkv_width(piece.heads) for piece in pieces)
    total = weights.nbytes(qkv, config.hidden_size)
    for bundle in bundles:
        total += weights.nbytes(config.hidden_size, config.head_dim * _heads(bundle))
    values = qkv * config.qkv_bias
    values += config.hidden_size * sum(
        config.o_bias and any(piece.adds_attention_bias for piece in bundle) for bundle in bundles
    )
    values += config.qk_norm * sum(
        config.head_dim * (len(piece.heads) + len(shape.kv_heads(piece.heads))) for piece in pieces
    )
    return total + values * precision.compute_dtype.itemsize


def _feed_forward_bytes(bundle: Bundle, config: ModelConfig, precision: Precision) -> int:
    """Count the bytes of one feed-forward part; the gain of the norm before it is folded in."""
    weights, columns = precision.weight_format, sum(len(piece.columns) for piece in bundle)
    total = weights.nbytes(2 * columns, config.hidden_size)
    total += weights.nbytes(config.hidden_size, columns)
    if not config.mlp_bias:
        return total
    adds = any(piece.adds_feed_forward_bias for piece in bundle)
    values = 2 * columns + config.hidden_size * adds
    return total + values * precision.compute_dtype.itemsize


def _heads(pieces: Iterable[Piece]) -> int:
    return sum(len(piece.heads) for piece in pieces)
