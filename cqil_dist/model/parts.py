"""The two parts of a decoder layer, as everything above them sees them.

A part computes the layers, or the shares of layers, that one rank holds of one stage: one wide
computation, since the members of a concurrent group take the same input. It includes the norm
before it, so that how gains are applied is its own business. `cqil_dist.model.torch_parts` has the
parts that torch computes; a backend for other devices or weight formats makes others behind the
same interface.

Axes in names: N tokens of a step, D model width, B attention bundles (outputs that are seen by the
same feed-forward parts, hence summed where they are computed), M feed-forward inputs, R tokens
whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cqil_dist.assignment import Bundle
from cqil_dist.model.kv_cache import KVCache
from cqil_dist.model.step import StepInput


class AttentionPart(Protocol):
    """The norm, query, key and value products, positions, KV cache, attention, output product."""

    def __call__(self, x_ND: Tensor, step: StepInput) -> Tensor:
        """Compute all bundles' attention outputs, [B, N, D], contiguous; cache keys and values."""
        ...


class FeedForwardPart(Protocol):
    """The norm, gate and up products, activation and down product, for M different inputs."""

    def __call__(self, u_MND: Tensor) -> Tensor:
        """Return the sum of the outputs for all inputs, [N, D]."""
        ...


class HeadPart(Protocol):
    """The final norm and vocabulary head, for some rows of the vocabulary."""

    def __call__(self, hidden_RD: Tensor) -> Tensor:
        """Return the float32 logits [R, rows] of the tokens after which logits are wanted."""
        ...


class PartBackend(Protocol):
    """A maker of the parts of one checkpoint's pieces. Parts of the same bundles share weights."""

    def attention(self, bundles: Sequence[Bundle], cache: KVCache) -> AttentionPart:
        """Make the part that computes the attention of these bundles of pieces.

        Args:
            cache: room for the keys and values of the bundles' pieces.

        Raises:
            CheckpointError: a tensor is missing, misshapen or unreadable.
        """
        ...

    def feed_forward(self, bundles: Sequence[Bundle]) -> FeedForwardPart:
        """Make the part that computes the feed-forward of these bundles, an input for each.

        Raises:
            CheckpointError: a tensor is missing, misshapen or unreadable.
        """
        ...

    def head(self, rows: range) -> HeadPart:
        """Make the part that computes these rows of the vocabulary head.

        Raises:
            CheckpointError: a tensor is missing, misshapen or unreadable.
        """
        ...

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weights that were loaded."""
        ...
