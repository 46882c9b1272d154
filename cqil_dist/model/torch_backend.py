"""Builds torch's parts from a checkpoint, reading the tensors of the pieces at hand alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from cqil_dist.assignment import Bundle
from cqil_dist.costs import ModelShape, Piece
from cqil_dist.errors import CheckpointError
from cqil_dist.model.checkpoint import Checkpoint, layer_tensor
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.formats import FloatFormat
from cqil_dist.model.head import HeadShard
from cqil_dist.model.kv_cache import KVCache
from cqil_dist.model.precision import Precision
from cqil_dist.model.projection import Projection
from cqil_dist.model.tensor_reader import TensorReader
from cqil_dist.model.torch_parts import (
    AttentionSpan,
    GatedProjections,
    TorchAttention,
    TorchFeedForward,
)

# A projection's name, its whole width beside the model's, and the part of it that a piece takes.
_Part = tuple[str, int, Callable[[Piece], range]]


class TorchBackend:
    """A `PartBackend` whose parts torch computes: it reads, slices, folds and lays out weights.

    Stages that compute the same bundles, of one plan or of several, share their weights.

    Raises:
        CheckpointError: the numbers are none that torch computes with unconverted.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        precision: Precision,
        device: torch.device,
    ) -> None:
        weights = precision.weight_format
        numbers = {precision.compute, precision.weights, precision.kv, precision.wire}
        if not isinstance(weights, FloatFormat) or len(numbers) > 1:
            raise CheckpointError(
                f"torch's parts convert nothing between {', '.join(sorted(numbers))}; use float32, "
                "float16 or bfloat16 for all of compute, weights, kv and wire"
            )
        self._config = config
        self._shape: ModelShape = config.shape
        self._checkpoint = checkpoint
        self._weights = weights
        self._dtype = precision.compute_dtype
        self._device = device
        self._attentions: dict[tuple[Bundle, ...], TorchAttention] = {}
        self._feed_forwards: dict[Bundle, GatedProjections] = {}
        self._heads: dict[range, HeadShard] = {}

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weights that were loaded."""
        made = (self._attentions, self._feed_forwards, self._heads)
        return sum(part.nbytes for parts in made for part in parts.values())

    def attention(self, bundles: Sequence[Bundle], cache: KVCache) -> TorchAttention:
        """See `PartBackend.attention`."""
        key = tuple(bundles)
        if key not in self._attentions:
            with self._checkpoint.open() as reader:
                self._attentions[key] = self._attention(reader, bundles, cache)
        return self._attentions[key]

    def feed_forward(self, bundles: Sequence[Bundle]) -> TorchFeedForward:
        """See `PartBackend.feed_forward`."""
        for bundle in bundles:
            if bundle not in self._feed_forwards:
                with self._checkpoint.open() as reader:
                    self._feed_forwards[bundle] = self._feed_forward(reader, bundle)
        gated = tuple(self._feed_forwards[bundle] for bundle in bundles)
        return TorchFeedForward(gated, self._config.rms_norm_eps)

    def head(self, rows: range) -> HeadShard:
        """See `PartBackend.head`."""
        if rows not in self._heads:
            self._heads[rows] = HeadShard.load(
                self._config, self._checkpoint, rows, self._weights, self._device
            )
        return self._heads[rows]

    def _attention(
        self, reader: TensorReader, bundles: Sequence[Bundle], cache: KVCache
    ) -> TorchAttention:
        config = self._config
        pieces = [piece for bundle in bundles for piece in bundle]
        kv_width = config.num_kv_heads * config.head_dim
        parts = [
            ("self_attn.q_proj", config.num_heads * config.head_dim, self._query_columns),
            ("self_attn.k_proj", kv_width, self._kv_columns),
            ("self_attn.v_proj", kv_width, self._kv_columns),
        ]
        return TorchAttention(
            qkv=self._stacked(reader, pieces, parts, "input_layernorm", config.qkv_bias),
            head_gains_HE=self._head_gains(reader, pieces),
            outputs=self._outputs(reader, bundles),
            spans=attention_spans(pieces, self._shape, config.windows),
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            cache=cache,
        )

    def _outputs(self, reader: TensorReader, bundles: Sequence[Bundle]) -> tuple[Projection, ...]:
        config = self._config
        part = ("self_attn.o_proj", config.num_heads * config.head_dim, self._query_columns)
        biased = [
            [piece for piece in bundle if config.o_bias and piece.adds_attention_bias]
            for bundle in bundles
        ]
        return tuple(
            self._summed(reader, bundle, part, adding)
            for bundle, adding in zip(bundles, biased, strict=True)
        )

    def _feed_forward(self, reader: TensorReader, bundle: Bundle) -> GatedProjections:
        config = self._config

        def columns_of(piece: Piece) -> range:
            return piece.columns

        gate, up, down = (
            (f"mlp.{name}_proj", config.intermediate_size, columns_of)
            for name in ("gate", "up", "down")
        )
        biased = [piece for piece in bundle if config.mlp_bias and piece.adds_feed_forward_bias]
        return GatedProjections(
            gate_up=self._stacked(
                reader, bundle, [gate, up], "post_attention_layernorm", config.mlp_bias
            ),
            down=self._summed(reader, bundle, down, biased),
        )

    def _stacked(
        self,
        reader: TensorReader,
        pieces: Sequence[Piece],
        parts: Sequence[_Part],
        norm: str,
        bias: bool,
    ) -> Projection:
        """Load one wide projection of the normalised input: by part, and within it by piece.

        The gain of the norm before it is folded in, in float32.
        """
        hidden = self._config.hidden_size
        outputs = sum(len(columns_of(piece)) for _, _, columns_of in parts for piece in pieces)
        wide = Projection.empty(outputs, hidden, bias, self._weights, self._device)
        first = 0
        for name, width, columns_of in parts:
            for piece in pieces:
                rows = columns_of(piece)
                gain = reader.read(layer_tensor(piece.layer, f"{norm}.weight"), (hidden,))
                tensor = layer_tensor(piece.layer, f"{name}.weight")
                weight = reader.read(tensor, (width, hidden), rows=rows)
                wide.weight.write(weight.float() * gain.float(), first_output=first)
                if wide.bias_O is not None:
                    tensor = layer_tensor(piece.layer, f"{name}.bias")
                    last = first + len(rows)
                    wide.bias_O[first:last] = reader.read(tensor, (width,), rows=rows)
                first += len(rows)
        return wide

    def _summed(
        self, reader: TensorReader, bundle: Bundle, part: _Part, biased: Sequence[Piece]
    ) -> Projection:
        """Load one wide projection whose output is the sum of the bundle's outputs.

        Args:
            biased: the pieces whose layers' output biases are added here.
        """
        hidden = self._config.hidden_size
        name, width, columns_of = part
        inputs = sum(len(columns_of(piece)) for piece in bundle)
        wide = Projection.empty(hidden, inputs, bool(biased), self._weights, self._device)
        first = 0
        for piece in bundle:
            columns = columns_of(piece)
            tensor = layer_tensor(piece.layer, f"{name}.weight")
            block = reader.read(tensor, (hidden, width), columns=columns)
            wide.weight.write(block, first_input=first)
            first += len(columns)
        for piece in biased:
            assert wide.bias_O is not None, "there is room for the bias"
            tensor = layer_tensor(piece.layer, f"{name}.bias")
            wide.bias_O.add_(reader.read(tensor, (hidden,)).to(self._device))
        return wide

    def _head_gains(self, reader: TensorReader, pieces: Sequence[Piece]) -> Tensor | None:
        if not self._config.qk_norm:
            return None
        head_dim = self._config.head_dim
        gains: list[Tensor] = []
        for name in ("q_norm", "k_norm"):
            for piece in pieces:
                heads = piece.heads if name == "q_norm" else self._shape.kv_heads(piece.heads)
                tensor = layer_tensor(piece.layer, f"self_attn.{name}.weight")
                gains.append(reader.read(tensor, (head_dim,)).expand(len(heads), -1))
        return torch.cat(gains).to(self._device, self._dtype)

    def _query_columns(self, piece: Piece) -> range:
        return _scaled(piece.heads, self._config.head_dim)

    def _kv_columns(self, piece: Piece) -> range:
        return _scaled(self._shape.kv_heads(piece.heads), self._config.head_dim)


def attention_spans(
    pieces: Sequence[Piece], shape: ModelShape, windows: Sequence[int | None]
) -> tuple[AttentionSpan, ...]:
    """Find which query heads of some pieces attend together, as they lie side by side.

    Adjacent key/value heads that are read by equally many queries under one window are one span,
    of one layer or of several.

    Args:
        windows: of every layer of the model.
    """
    group = shape.queries_per_kv
    read = [  # by how many queries, and under which window, each key/value head is read
        (
            min(piece.heads.stop, (head + 1) * group) - max(piece.heads.start, head * group),
            windows[piece.layer],
        )
        for piece in pieces
        for head in shape.kv_heads(piece.heads)
    ]
    spans: list[AttentionSpan] = []
    query = kv_head = 0
    for (queries, window), alike in groupby(read):
        heads = len(list(alike))
        spans.append(
            AttentionSpan(
                range(query, query + heads * queries),
                range(kv_head, kv_head + heads),
                queries,
                window,
            )
        )
        query, kv_head = query + heads * queries, kv_head + heads
    return tuple(spans)


def _scaled(units: range, width: int) -> range:
    return range(units.start * width, units.stop * width)
