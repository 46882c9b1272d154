"""Builds a rank's parts of one stage from the checkpoint, reading only that rank's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from cqil_dist.assignment import Piece, Stage
from cqil_dist.model.checkpoint import Checkpoint, TensorReader, layer_tensor
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.parts import AttentionPart, FeedForwardPart, OutputProjection
from cqil_dist.model.projection import Projection

# A projection's name, its whole width beside the model's, and the part of it a piece takes.
_Part = tuple[str, int, Callable[[Piece], range]]


@dataclass(frozen=True)
class StageParts:
    """What one rank computes of one stage.

    Attributes:
        feed_forwards: one part a feed-forward bundle, with the attention bundles its input takes
            (rank, bundle index) beside the stage's input.
    """

    attention: AttentionPart
    feed_forwards: tuple[tuple[FeedForwardPart, tuple[tuple[int, int], ...]], ...]
    kv_heads: int

    @property
    def nbytes(self) -> int:
        return self.attention.nbytes + sum(part.nbytes for part, _ in self.feed_forwards)


class PartLoader:
    """Reads, slices, folds and lays out the weights of pieces.

    Stages that compute the same pieces together, of one plan or of several, share their weights.
    """

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._attentions: dict[tuple[tuple[Piece, ...], ...], AttentionPart] = {}
        self._feed_forwards: dict[tuple[Piece, ...], FeedForwardPart] = {}

    @property
    def nbytes(self) -> int:
        """Of all that has been loaded."""
        attentions = sum(part.nbytes for part in self._attentions.values())
        return attentions + sum(part.nbytes for part in self._feed_forwards.values())

    def load(self, stage: Stage, rank: int) -> StageParts:
        """The parts of `rank`, which holds at least one piece of `stage`.

        Raises:
            CheckpointError: a tensor is missing, misshapen or unreadable.
        """
        pieces = stage.pieces[rank]
        bundles = stage.attention_bundles(rank)  # together they are the pieces, in order
        with self._checkpoint.open() as reader:
            if bundles not in self._attentions:
                self._attentions[bundles] = self._attention(reader, pieces, bundles)
            for bundle in stage.feed_forward_bundles(rank):
                if bundle not in self._feed_forwards:
                    self._feed_forwards[bundle] = self._feed_forward(reader, bundle)
        feed_forwards = tuple(
            (self._feed_forwards[bundle], stage.attention_inputs(bundle[0]))
            for bundle in stage.feed_forward_bundles(rank)
        )
        kv_heads = sum(len(self._kv_heads(piece)) for piece in pieces)
        return StageParts(self._attentions[bundles], feed_forwards, kv_heads)

    def _attention(
        self,
        reader: TensorReader,
        pieces: tuple[Piece, ...],
        bundles: tuple[tuple[Piece, ...], ...],
    ) -> AttentionPart:
        config = self._config
        parts = [
            ("self_attn.q_proj", config.num_heads * config.head_dim, self._query_columns),
            ("self_attn.k_proj", config.num_kv_heads * config.head_dim, self._kv_columns),
            ("self_attn.v_proj", config.num_kv_heads * config.head_dim, self._kv_columns),
        ]
        return AttentionPart(
            qkv=self._stacked(reader, pieces, parts, "input_layernorm", config.qkv_bias),
            head_gains_HE=self._head_gains(reader, pieces),
            outputs=self._outputs(reader, bundles),
            windows=self._windows(pieces),
            queries_per_kv=config.queries_per_kv,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
        )

    def _outputs(
        self, reader: TensorReader, bundles: tuple[tuple[Piece, ...], ...]
    ) -> tuple[OutputProjection, ...]:
        config = self._config
        part = ("self_attn.o_proj", config.num_heads * config.head_dim, self._query_columns)
        outputs: list[OutputProjection] = []
        first = 0
        for bundle in bundles:
            projection = self._summed(reader, bundle, part, config.o_bias)
            last = first + projection.weight_IO.shape[0]
            outputs.append(OutputProjection(slice(first, last), projection))
            first = last
        return tuple(outputs)

    def _feed_forward(self, reader: TensorReader, bundle: tuple[Piece, ...]) -> FeedForwardPart:
        width = self._config.intermediate_size
        bias = self._config.mlp_bias

        def columns_of(piece: Piece) -> range:
            return piece.part_of(width)

        gate, up, down = (
            (f"mlp.{name}_proj", width, columns_of) for name in ("gate", "up", "down")
        )
        return FeedForwardPart(
            gate_up=self._stacked(reader, bundle, [gate, up], "post_attention_layernorm", bias),
            down=self._summed(reader, bundle, down, bias),
        )

    def _stacked(
        self,
        reader: TensorReader,
        pieces: tuple[Piece, ...],
        parts: Sequence[_Part],
        norm: str,
        bias: bool,
    ) -> Projection:
        """One wide projection of the normalised input: part by part, within it piece by piece.

        The gain of the norm before it is folded in, in float32.
        """
        hidden = self._config.hidden_size
        outputs = sum(len(columns_of(piece)) for _, _, columns_of in parts for piece in pieces)
        wide = Projection.empty(outputs, hidden, bias, self._dtype, self._device)
        first = 0
        for name, width, columns_of in parts:
            for piece in pieces:
                rows = columns_of(piece)
                gain = reader.read(layer_tensor(piece.layer, f"{norm}.weight"), (hidden,))
                tensor = layer_tensor(piece.layer, f"{name}.weight")
                weight = reader.read(tensor, (width, hidden), rows=rows)
                last = first + len(rows)
                wide.weight_OI[first:last] = weight.float() * gain.float()
                if wide.bias_O is not None:
                    tensor = layer_tensor(piece.layer, f"{name}.bias")
                    wide.bias_O[first:last] = reader.read(tensor, (width,), rows=rows)
                first = last
        return wide

    def _summed(
        self, reader: TensorReader, bundle: tuple[Piece, ...], part: _Part, bias: bool
    ) -> Projection:
        """One wide projection whose output is the sum of the bundle's."""
        hidden = self._config.hidden_size
        name, width, columns_of = part
        inputs = sum(len(columns_of(piece)) for piece in bundle)
        wide = Projection.empty(hidden, inputs, bias, self._dtype, self._device)
        first = 0
        for piece in bundle:
            columns = columns_of(piece)
            tensor = layer_tensor(piece.layer, f"{name}.weight")
            last = first + len(columns)
            wide.weight_OI[:, first:last] = reader.read(tensor, (hidden, width), columns=columns)
            # A sharded layer's bias belongs to its first shard: it must enter the sum once.
            if wide.bias_O is not None and piece.shard == 0:
                tensor = layer_tensor(piece.layer, f"{name}.bias")
                wide.bias_O.add_(reader.read(tensor, (hidden,)).to(self._device))
            first = last
        return wide

    def _head_gains(self, reader: TensorReader, pieces: Sequence[Piece]) -> Tensor | None:
        if not self._config.qk_norm:
            return None
        head_dim = self._config.head_dim
        gains: list[Tensor] = []
        for name, per_kv in (("q_norm", self._config.queries_per_kv), ("k_norm", 1)):
            for piece in pieces:
                tensor = layer_tensor(piece.layer, f"self_attn.{name}.weight")
                gain = reader.read(tensor, (head_dim,))
                gains.append(gain.expand(len(self._kv_heads(piece)) * per_kv, -1))
        return torch.cat(gains).to(self._device, self._dtype)

    def _windows(self, pieces: Sequence[Piece]) -> tuple[tuple[range, int | None], ...]:
        windows: list[tuple[range, int | None]] = []
        first = 0
        for window, run in groupby(pieces, lambda piece: self._config.windows[piece.layer]):
            last = first + sum(len(self._kv_heads(piece)) for piece in run)
            windows.append((range(first, last), window))
            first = last
        return tuple(windows)

    def _kv_heads(self, piece: Piece) -> range:
        return piece.part_of(self._config.num_kv_heads)

    def _kv_columns(self, piece: Piece) -> range:
        return _scaled(self._kv_heads(piece), self._config.head_dim)

    def _query_columns(self, piece: Piece) -> range:
        return _scaled(self._kv_heads(piece), self._config.queries_per_kv * self._config.head_dim)


def _scaled(units: range, width: int) -> range:
    return range(units.start * width, units.stop * width)
