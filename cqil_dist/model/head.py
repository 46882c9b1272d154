"""The two ends of the model: token embedding and vocabulary head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cqil_dist.model.checkpoint import EMBEDDING, FINAL_NORM, HEAD, Checkpoint
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.formats import FloatFormat
from cqil_dist.model.projection import Projection
from cqil_dist.model.torch_parts import rms_norm

# The head is a model's largest matrix: it is read in blocks, so that loading needs little more
# memory than the shard itself.
_ROWS_AT_ONCE = 1024


class Embedding:
    """The token embeddings [V, D], in the dtype in which hidden states travel."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        with checkpoint.open() as reader:
            weight = reader.read(EMBEDDING, (config.vocab_size, config.hidden_size))
            self.weight_VD = weight.to(dtype)

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        """Return the hidden states [N, D] of N tokens."""
        return self.weight_VD[torch.tensor(token_ids)]


@dataclass(frozen=True)
class HeadShard:
    """A rank's rows of the vocabulary head, with the final norm's gain folded in."""

    projection: Projection
    eps: float

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        checkpoint: Checkpoint,
        rows: range,
        weights: FloatFormat,
        device: torch.device,
    ) -> HeadShard:
        """Read these rows of the head.

        Raises:
            CheckpointError: the head or the final norm is missing, misshapen or unreadable.
        """
        name = EMBEDDING if config.tied_head else HEAD
        shape = (config.vocab_size, config.hidden_size)
        projection = Projection.empty(len(rows), config.hidden_size, False, weights, device)
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[first : first + _ROWS_AT_ONCE]
            with checkpoint.open() as reader:
                gain = reader.read(FINAL_NORM, (config.hidden_size,)).float()
                folded = reader.read(name, shape, rows=block).float() * gain
            projection.weight.write(folded, first_output=first)
        return cls(projection, config.rms_norm_eps)

    def __call__(self, hidden_RD: Tensor) -> Tensor:
        """See `HeadPart`."""
        return self.projection(rms_norm(hidden_RD, self.eps)).float()

    @property
    def nbytes(self) -> int:
        return self.projection.nbytes
