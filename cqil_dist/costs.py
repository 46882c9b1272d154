"""What pieces of layers take: values held and time, counted from the model's shape.

Knows neither plans nor ranks, tensors nor checkpoints. How many bytes a value takes is told by its
weight format (`cqil_dist.model.formats`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Piece:
    """The part of one layer that one rank computes.

    Attributes:
        layer: index of the layer in the model.
        heads: query heads whose attention is computed. The key/value heads they read are cached
            wherever they are read, by several ranks if need be.
        columns: feed-forward columns, that is rows of the gate and up projections and columns of
            the down projection.
    """

    layer: int
    heads: range
    columns: range

    @property
    def adds_attention_bias(self) -> bool:
        """Return whether this piece adds the output projection's bias, which must enter once."""
        return bool(self.heads) and self.heads.start == 0

    @property
    def adds_feed_forward_bias(self) -> bool:
        """Return whether this piece adds the down projection's bias, which must enter once."""
        return bool(self.columns) and self.columns.start == 0


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a pre-norm decoder that decide what its layers take."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    def whole(self, layer: int) -> Piece:
        """Return the piece that has all heads and columns of a layer."""
        return Piece(layer, range(self.num_heads), range(self.intermediate_size))

    @cached_property
    def queries_per_kv(self) -> int:
        """Return how many query heads read one key/value head (grouped-query attention)."""
        return self.num_heads // self.num_kv_heads

    def kv_heads(self, heads: range) -> range:
        """Return the key/value heads that these query heads read."""
        if not heads:
            return range(0)
        return range(
            heads.start // self.queries_per_kv, (heads.stop - 1) // self.queries_per_kv + 1
        )

    def qkv_width(self, heads: range) -> int:
        """Count the outputs of the query, key and value projections for these query heads."""
        return (len(heads) + 2 * len(self.kv_heads(heads))) * self.head_dim

    def attention_weights(self, heads: range) -> int:
        """Count the weights of the four attention projections for these query heads."""
        return self.hidden_size * (self.qkv_width(heads) + len(heads) * self.head_dim)

    def feed_forward_weights(self, columns: range) -> int:
        """Count the weights of the gate, up and down projections for these columns."""
        return self.hidden_size * 3 * len(columns)

    @cached_property
    def layer_weights(self) -> int:
        """Return how many weights the seven projections of a whole layer have."""
        whole = self.whole(0)
        return self.attention_weights(whole.heads) + self.feed_forward_weights(whole.columns)

    def kv_values(self, heads: range) -> int:
        """Count the values cached for each token, keys and values, for these query heads."""
        return 2 * len(self.kv_heads(heads)) * self.head_dim

    def split(
        self, layer: int, parts: int, block: int = 1, *, together: bool = False
    ) -> list[Piece]:
        """Split a layer into `parts` pieces that take equal time, as far as heads and blocks allow.

        Decoding reads every weight once, so weights stand for time.

        Args:
            block: columns are cut at multiples of this many, a weight format's group.
            together: balance attention and feed-forward as one, for a layer without an exchange in
                between; else each for itself.
        """
        heads = _balanced_heads(self, parts)
        attention = [self.attention_weights(part) for part in heads]
        wanted = [1.0] * parts
        if together:
            per_column = self.feed_forward_weights(range(1))
            even = (sum(attention) / per_column + self.intermediate_size) / parts
            wanted = [max(0.0, even - weights / per_column) for weights in attention]
        columns = _in_proportion(self.intermediate_size, wanted, block)
        return [Piece(layer, *part) for part in zip(heads, columns, strict=True)]


@dataclass(frozen=True)
class Costs:
    """The measured times of a decoded token of one model, in microseconds.

    Attributes:
        shape: of the model.
        layer_us: one whole layer on one rank.
        head_us: the whole vocabulary head on one rank.
        link_us: an exchange between ranks, from when the last of them is ready.
    """

    shape: ModelShape
    layer_us: float
    head_us: float
    link_us: float

    def attention_us(self, pieces: Iterable[Piece]) -> float:
        """Return the time that one rank takes for the attention of these pieces."""
        weights = sum(self.shape.attention_weights(piece.heads) for piece in pieces)
        return self.layer_us * weights / self.shape.layer_weights

    def feed_forward_us(self, pieces: Iterable[Piece]) -> float:
        """Return the time that one rank takes for the feed-forward columns of these pieces."""
        weights = sum(self.shape.feed_forward_weights(piece.columns) for piece in pieces)
        return self.layer_us * weights / self.shape.layer_weights


def evenly(total: int, parts: int) -> list[range]:
    """Cut 0 .. total-1 into `parts` adjacent ranges whose lengths differ by 1 at most."""
    return _in_proportion(total, [1.0] * parts, 1)


def _in_proportion(total: int, wanted: Sequence[float], block: int) -> list[range]:
    """Cut 0 .. total-1 at multiples of `block` into adjacent ranges of about these proportions."""
    blocks = -(-total // block)
    scale = blocks / (sum(wanted) or 1.0)
    cuts, so_far = [0], 0.0
    for share in wanted:
        so_far += share
        # The sum of the shares reaches all blocks but for its last bits.
        cuts.append(min(total, block * int(so_far * scale + 1e-9)))
    cuts[-1] = total
    return [range(first, last) for first, last in itertools.pairwise(cuts)]


@lru_cache(maxsize=64)
def _balanced_heads(shape: ModelShape, parts: int) -> tuple[range, ...]:
    """Cut the query heads into `parts` adjacent ranges whose largest takes as little as can be.

    A range that begins or ends within the query heads of one key/value head reads that head too,
    so that equal numbers of heads need not take equally long.
    """
    heads = shape.num_heads
    cost = [
        [shape.attention_weights(range(first, last)) for last in range(heads + 1)]
        for first in range(heads + 1)
    ]
    # best[last]: the ranges that end at `last`, by their largest and their sum of squares, which
    # tells even ranges from uneven ones of the same largest.
    best: list[tuple[int, int, tuple[int, ...]]] = [
        (cost[0][last], cost[0][last] ** 2, (0,)) for last in range(heads + 1)
    ]
    for _ in range(1, parts):
        best = [
            min(
                (
                    (max(most, cost[cut][last]), squares + cost[cut][last] ** 2, (*cuts, cut))
                    for cut, (most, squares, cuts) in reversed([*enumerate(best[: last + 1])])
                ),
                key=lambda found: found[:2],
            )
            for last in range(heads + 1)
        ]
    cuts = (*best[heads][2], heads)
    return tuple(range(first, last) for first, last in itertools.pairwise(cuts))
