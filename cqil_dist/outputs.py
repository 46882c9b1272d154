"""Defines what a request gives back: text, tokens, logprobs, why it ended and how long it took.

Plain frozen values, with the field names of vLLM and of the OpenAI API. This module knows nothing
of how they came to be, and imports the standard library alone, so that a client stays light.
Every `to_dict` gives only what JSON has: dicts, lists, str, int, float, bool and None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cqil_dist.timeline import StepTimeline

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one token at one position, under the model's unaltered logits.

    Attributes:
        token_id: the token.
        token: its text on its own (a part of a character shows as U+FFFD).
        logprob: natural logarithm of its probability, at most 0; None for a prompt's first token,
            which follows nothing.
        top: the most probable tokens at this position, best first, if asked for; theirs is empty.
    """

    token_id: int
    token: str
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "token_id": self.token_id,
            "token": self.token,
            "logprob": self.logprob,
            "top": [alternative.to_dict() for alternative in self.top],
        }


@dataclass(frozen=True)
class Usage:
    """A count of the tokens that a request brought, and of those it got."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
        }


@dataclass(frozen=True)
class Timings:
    """The times at which a request's tokens came.

    Attributes:
        ttft_ms: time to first token, milliseconds from the request's arrival.
        itl_ms: inter-token latencies, milliseconds between each token and the one before it; one
            fewer than there are tokens.
    """

    ttft_ms: float
    itl_ms: tuple[float, ...] = ()

    def itl_percentile(self, percent: float) -> float | None:
        """Find the inter-token latency in ms that `percent` (0 to 100) of them do not exceed.

        It interpolates between neighbours as numpy does, and is None for fewer than two tokens.
        """
        return percentile(self.itl_ms, percent) if self.itl_ms else None

    @property
    def itl_p50_ms(self) -> float | None:
        """Return the median inter-token latency in ms; None if there are fewer than two tokens."""
        return self.itl_percentile(50)

    @property
    def itl_p90_ms(self) -> float | None:
        """Return the inter-token latency in milliseconds that 90 of 100 do not exceed."""
        return self.itl_percentile(90)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Return the tokens after the first over the seconds they took; None if there are none."""
        total_ms = sum(self.itl_ms)
        return 1000 * len(self.itl_ms) / total_ms if total_ms > 0 else None

    @property
    def total_ms(self) -> float:
        """Return the milliseconds from the request's arrival to its last token."""
        return self.ttft_ms + sum(self.itl_ms)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ttft_ms": self.ttft_ms,
            "itl_ms": list(self.itl_ms),
            "itl_p50_ms": self.itl_p50_ms,
            "itl_p90_ms": self.itl_p90_ms,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "total_ms": self.total_ms,
        }


@dataclass(frozen=True)
class Completion:
    """The whole answer to a request.

    Attributes:
        text: the output, without special tokens and without the stop string that ended it.
        token_ids: all generated tokens, those of a stop string included.
        finish_reason: "stop" (end-of-sequence token, stop string or stop token), "length"
            (max_tokens or the context is used up) or "abort".
        stop_reason: the stop string or stop token id that ended it; None for the model's own
            end-of-sequence token and for other finish reasons.
        usage, timings: token counts and latencies.
        logprobs: one per token id, or None if they were not asked for.
        seed: what to pass as `SamplingParams.seed` to get the same tokens again.
        prompt_logprobs: one per token of the prompt, or None if they were not asked for.
        prompt_text: the prompt's text, if it was asked for with `echo`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    seed: int | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_text: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "usage": self.usage.to_dict(),
            "timings": self.timings.to_dict(),
            "logprobs": _logprob_dicts(self.logprobs),
            "seed": self.seed,
            "prompt_logprobs": _logprob_dicts(self.prompt_logprobs),
            "prompt_text": self.prompt_text,
        }


@dataclass(frozen=True)
class Chunk:
    """A part of a streamed answer: all that is new since the chunk before.

    Attributes:
        text: newly final text. May be empty: half a character, or what may yet become a stop
            string, is held back for a later chunk.
        token_ids: the tokens generated since the chunk before.
        logprobs: one per token id, or None if they were not asked for.
        finish_reason, stop_reason: as in `Completion`, on the last chunk; None before.
        result: the whole answer, on the last chunk; None before.
        timeline: where the time of the step went that the tokens come from, if it was asked for. A
            step that computes a part of the prompt has a chunk without tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    result: Completion | None = None
    timeline: StepTimeline | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "logprobs": _logprob_dicts(self.logprobs),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "result": None if self.result is None else self.result.to_dict(),
            "timeline": None if self.timeline is None else self.timeline.to_dict(),
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """Find the number that `percent` (0 to 100) of one or more values do not exceed.

    It interpolates between neighbours, as numpy does by default.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _logprob_dicts(logprobs: tuple[TokenLogprob, ...] | None) -> list[dict[str, Any]] | None:
    return None if logprobs is None else [logprob.to_dict() for logprob in logprobs]
