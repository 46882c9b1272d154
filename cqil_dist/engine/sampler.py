"""Chooses the next token of a request from the model's logits.

The maths is transformers' logits processors in the order of its `generate`. What is added here:
draws that depend only on (seed, index of the token), so that a request resumes anywhere with the
same tokens; and short cuts that leave the distribution as it is. This module knows nothing of
text, stops, batching, or where the logits come from.

Short cuts, with one core's time for one token of a 49,152 token vocabulary:

- Greedy without a penalty is a bare argmax.
- top_p: a nucleus of mass p is found on a shortlist. A token with probability at most (1 - p) / V
  cannot be in it (all V tokens that small together hold no more than 1 - p), and where the rest
  hold mass S, the nucleus of mass p of everything is that of mass p / S of the rest. Sorting the
  whole vocabulary instead takes 4 ms.
- The draw inverts the cumulative distribution with one uniform number; `torch.multinomial` makes
  V exponential ones, which takes 1 ms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cqil_dist.errors import CqilError
from cqil_dist.sampling_params import SamplingParams

# Warpers take the tokens so far as any logits processor does, and leave them unread.
_UNUSED = torch.LongTensor()


class SampledToken(NamedTuple):
    """The token chosen and, where the request asks for logprobs, how probable it was.

    Attributes:
        token_id: 0 .. V-1.
        logprob: log_softmax of the model's logits, before penalty, temperature and filters (vLLM's
            "raw_logprobs"); None if not asked for.
        top: (token id, logprob) of the most probable tokens, best first; empty if none asked for.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one request.

    Args:
        params: the request's settings.
        prompt_ids: the prompt's tokens, which the repetition penalty counts.

    Attributes:
        seed: the request's seed, or the one drawn for it.
        argmax_suffices: whether the most likely token is all it wants to know of the logits.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        seed = params.seeded().seed
        assert seed is not None, "drawn where it was not given"
        self.seed = seed
        self.argmax_suffices = (
            params.greedy and params.repetition_penalty == 1 and params.logprobs is None
        )
        self._params = params
        self._prompt_length = len(prompt_ids)
        self._penalty: RepetitionPenaltyLogitsProcessor | None = None
        if params.repetition_penalty != 1.0:
            self._penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
            self._prompt_1P = torch.tensor([prompt_ids], dtype=torch.long)

    def sample(self, logits_V: Tensor, history: Sequence[int], position: int) -> SampledToken:
        """Choose the output token at index `position`.

        The result depends on the arguments, the params and `.seed` alone, not on earlier calls.

        Args:
            logits_V: the model's logits, float32 [V]; not changed.
            history: the prompt's tokens and those generated so far.
            position: index of the token in the output, 0 for the first.

        Raises:
            CqilError: a logit is NaN or infinite.
        """
        check_finite(logits_V, f"output token {position}")
        token_id = self._choose(logits_V, history, position)
        if self._params.logprobs is None:
            return SampledToken(token_id)
        return scored(logits_V, token_id, self._params.logprobs)

    def _choose(self, logits_V: Tensor, history: Sequence[int], position: int) -> int:
        scores_1V = logits_V[None]
        if self._penalty is not None:
            scores_1V = self._penalty(self._seen_1N(history, logits_V.device), scores_1V)
        if self._params.greedy:
            return int(scores_1V.argmax())  # the first of equals, as in transformers
        return _draw(*self._candidates(scores_1V), _uniform(self.seed, position))

    def _seen_1N(self, history: Sequence[int], device: torch.device) -> Tensor:
        output_1G = torch.tensor([history[self._prompt_length :]], dtype=torch.long)
        return torch.cat([self._prompt_1P, output_1G], dim=1).to(device)

    def _candidates(self, scores_1V: Tensor) -> tuple[Tensor, Tensor]:
        """Give scores [1, K] and ids [K] of the tokens to draw from; a score of -inf is out."""
        params = self._params
        scores = TemperatureLogitsWarper(params.temperature)(_UNUSED, scores_1V)
        ids = torch.arange(scores.shape[-1], device=scores.device)
        if params.top_k:
            scores = TopKLogitsWarper(params.top_k)(_UNUSED, scores)
            ids = (scores[0] > -math.inf).nonzero().squeeze(1)
            scores = scores[:, ids]
        if params.top_p < 1.0:
            probs = scores.softmax(dim=-1)
            # The likeliest token is always on it, also where the bound rounds up to 1.
            bound = min((1 - params.top_p) / len(ids), float(probs.max()) / 2)
            shortlist = (probs[0] > bound).nonzero().squeeze(1)
            mass = float(probs[:, shortlist].sum())
            ids, scores = ids[shortlist], scores[:, shortlist]
            scores = TopPLogitsWarper(min(1.0, params.top_p / mass))(_UNUSED, scores)
        if params.min_p > 0.0:
            scores = MinPLogitsWarper(params.min_p)(_UNUSED, scores)
        return scores, ids


def scored(logits_V: Tensor, token_id: int, alternatives: int) -> SampledToken:
    """Work out how probable a token is under these logits, and which are the most probable."""
    logprobs_V = logits_V.log_softmax(dim=-1)
    top = logprobs_V.topk(min(alternatives, len(logprobs_V)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return SampledToken(token_id, float(logprobs_V[token_id]), tuple(pairs))


def chosen(token_id: Tensor) -> SampledToken:
    """Take a token id, int64 [], that the ranks chose. Raises CqilError for -1, no choice."""
    if (choice := int(token_id)) < 0:
        raise CqilError(
            "some logits are NaN or infinite, so no token can be chosen: the model overflowed in "
            "its dtype or its weights are damaged; try dtype float32"
        )
    return SampledToken(choice)


def check_finite(logits_V: Tensor, what: str) -> None:
    """Raise CqilError if a logit is NaN or infinite; `what` says in the message whose they are."""
    low, high = torch.aminmax(logits_V)  # one pass; both are NaN if any logit is
    if not (math.isfinite(low) and math.isfinite(high)):
        count = int((~logits_V.isfinite()).sum())
        raise CqilError(
            f"{count} of the {len(logits_V)} logits for {what} are NaN or infinite, "
            "so no token can be chosen: the model overflowed in its dtype or its weights "
            "are damaged; try dtype float32, and check the plan on a shorter prompt"
        )


def _uniform(seed: int, position: int) -> float:
    """Draw a number in [0, 1) that depends on (seed, position) alone: counter-based randomness."""
    counter = seed.to_bytes(8, signed=True) + position.to_bytes(8)
    return (int.from_bytes(blake2b(counter, digest_size=8).digest()) >> 12) / 2**52


def _draw(scores_1K: Tensor, ids_K: Tensor, uniform: float) -> int:
    cdf_K = scores_1K[0].softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    # The first token whose cdf exceeds the target: never one of probability 0, whose cdf is its
    # predecessor's. There is one, since a uniform of 52 bits keeps the product below cdf[-1].
    return int(ids_K[torch.searchsorted(cdf_K, uniform * cdf_K[-1], right=True)])
