"""The original model on some text, and how far plans diverge from it there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cqil_dist.plan import Group
from cqil_dist.planning.measure.grouped_model import (
    final_hidden,
    grouped,
    hidden_states,
    next_token_logits,
)
from cqil_dist.planning.measure.windows import Windows
from cqil_dist.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Divergence:
    """The divergence of a changed model from the original model, averaged over a text's tokens.

    Attributes:
        kl: KL(original || changed) of the next token's distribution, in nats.
        loss: the changed model's cross entropy on the text, in nats.
    """

    kl: float
    loss: float

    @property
    def perplexity(self) -> float:
        """Return the changed model's perplexity on the text."""
        return math.exp(self.loss)


class Baseline:
    """The original model's layer inputs and next-token distributions on some text.

    They are kept, so that a comparison computes no layer before the first changed group. They take
    4 bytes a token and vocabulary entry, and a hidden state a token and layer.

    Attributes:
        states_WL: for each window, every layer's input and the last layer's output, [1, T, D] each.
        perplexity: of the original model on the text.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, windows: Windows, progress: Progress) -> None:
        self.model = model
        self.windows = windows
        self.num_layers: int = model.config.num_hidden_layers
        self.states_WL: list[list[Tensor]] = []
        self._logprobs_WTV: list[Tensor] = []
        losses: list[float] = []
        with progress.task(
            "Computing the original model", len(windows.token_ids_WT), "windows"
        ) as task:
            for tokens_T in windows.token_ids_WT:
                self.states_WL.append(hidden_states(model, tokens_T))
                with grouped(model, []):
                    self._logprobs_WTV.append(self._logprobs(self.states_WL[-1][-1]))
                losses.append(_loss(self._logprobs_WTV[-1], tokens_T))
                task.advance()
        self.perplexity = math.exp(fmean(losses))

    @torch.inference_mode()
    def compare(self, groups: Sequence[Group]) -> Divergence:
        """Measure the divergence of a model made of these groups from the original model.

        Layers that no group names are left out.
        """
        changed = (n for n, each in enumerate(groups) if each.layers != (n,) or not each.is_exact)
        start = next(changed, len(groups))
        kls: list[float] = []
        losses: list[float] = []
        with grouped(self.model, groups[start:]):
            for window, tokens_T in enumerate(self.windows.token_ids_WT):
                logprobs_TV = self._logprobs(self.states_WL[window][start])
                baseline_TV = self._logprobs_WTV[window]
                kl = F.kl_div(logprobs_TV, baseline_TV, log_target=True, reduction="sum")
                kls.append(float(kl) / len(tokens_T))
                losses.append(_loss(logprobs_TV, tokens_T))
        return Divergence(fmean(kls), fmean(losses))

    def _logprobs(self, state_1TD: Tensor) -> Tensor:
        """Return next-token log probabilities [T, V] of a hidden state with the groups in place."""
        hidden_TD = final_hidden(self.model, inputs_embeds=state_1TD)[0]
        return next_token_logits(self.model, hidden_TD).log_softmax(-1)


def _loss(logprobs_TV: Tensor, tokens_T: Tensor) -> float:
    """Return the cross entropy of a window's tokens after the first, in nats a token."""
    return float(F.nll_loss(logprobs_TV[:-1], tokens_T[1:].to(logprobs_TV.device)))
