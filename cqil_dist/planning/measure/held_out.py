"""Divergence of a changed model from the original model on text that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cqil_dist.plan import Group
from cqil_dist.planning.measure.grouped_model import grouped
from cqil_dist.planning.measure.kl_loss import kl_loss
from cqil_dist.planning.measure.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The most tokens that go through the layers together.
_TOKENS_AT_ONCE = 2048


class HeldOut:
    """A held-out text, and the original model's final hidden states on it."""

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, windows: Windows, original: Callable[[Tensor], Tensor]
    ) -> None:
        """Compute the original model's final hidden states.

        Args:
            original: computes them, [C, T, D], from tokens [C, T].
        """
        self._model = model
        self._tokens_WT = windows.token_ids_WT.to(model.device)
        self._original_WTD = self._hidden(original)

    @torch.no_grad()
    def kl(self, groups: Sequence[Group], changed: Callable[[Tensor], Tensor]) -> float:
        """Return KL(original || changed) of the next token, in nats, averaged over the tokens.

        Args:
            groups: the groups of the model while `changed` is called.
            changed: computes the changed model's final hidden states, as `original` does.
        """
        with grouped(self._model, groups):
            changed_WTD = self._hidden(changed)
        return float(kl_loss(self._model, self._original_WTD, changed_WTD))

    def _hidden(self, compute: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([compute(tokens_CT) for tokens_CT in micro_batches(self._tokens_WT)])


def micro_batches(tokens_WT: Tensor) -> Sequence[Tensor]:
    """Split windows [W, T] into batches [C, T] small enough to compute at once."""
    return torch.split(tokens_WT, max(1, _TOKENS_AT_ONCE // tokens_WT.shape[1]))
