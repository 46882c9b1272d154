"""Defines what a request asks of generation: length, sampling, stops, logprobs.

Field names, defaults and meaning are those of vLLM's `SamplingParams`. This module validates and
carries the values; it knows nothing of tensors, tokenizers or how a token is drawn from them
(engine/sampler.py does), so a client can import it without torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from cqil_dist.errors import RequestError

MAX_LOGPROBS = 20
_INT32_MAX = 2**31 - 1  # what the wire carries

MAX_STOP = 16
"""The most stop texts a request may have."""

MAX_STOP_CHARACTERS = 1024
"""The most characters of one stop text: as much of an output may be held back."""

MAX_STOP_TOKEN_IDS = 256
"""The most stop tokens a request may have; they are looked for after every token."""

# Dividing logits by less than this only adds rounding; vLLM draws the same line.
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The settings by which one request's tokens are chosen, and which end it.

    Attributes:
        max_tokens: most tokens to generate. The default 16 is vLLM's and the completions API's: a
            forgotten limit costs a moment, not a full context. 0 computes the prompt alone, for its
            log probabilities.
        temperature: 0 or more; logits are divided by it. Below 1e-5 is greedy: the most probable
            token each time, and top_p, top_k, min_p and seed have no effect.
        top_p: in (0, 1]; draw from the fewest tokens whose probabilities reach this sum.
        top_k: draw from the k most probable tokens; 0 or -1 is off (-1 is stored as 0).
        min_p: in [0, 1]; drop tokens less probable than min_p times the most probable one.
        repetition_penalty: in [0.01, 100]; above 1 discourages tokens of the prompt and of the
            output so far (arXiv 1909.05858); 1 is off. It acts on greedy decoding too.
        stop: texts that end the output, which is cut just before them. A single text may be given
            as a str, several (16 at most, of up to 1024 characters) as a list.
        stop_token_ids: token ids that end the output, 256 at most; their own text is not part of
            it.
        seed: -2**63 to 2**63 - 1; the same seed, prompt and values give the same tokens. None
            draws one.
        logprobs: give the log-probability of each token and of this many alternatives, 0 to 20;
            None is off.
        ignore_eos: go on past the model's end-of-sequence token, for benchmarks.
        prompt_logprobs: give the log-probability of each token of the prompt and of this many
            alternatives, 0 to 20; None is off.

    Raises:
        RequestError: a value of the wrong type or outside its range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    prompt_logprobs: int | None = None

    def seeded(self) -> SamplingParams:
        """Copy the settings with a seed: the one given, or one drawn now.

        Drawn seeds are below 2**48, so that JSON readers that hold numbers as doubles keep them.
        """
        return self if self.seed is not None else replace(self, seed=int.from_bytes(os.urandom(6)))

    def __post_init__(self) -> None:
        # Values come from JSON and from untyped callers: types are checked as well as ranges, and
        # every value is stored in its field's one type.
        def store(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        _integer("max_tokens", self.max_tokens, low=0, high=_INT32_MAX)
        temperature = _number("temperature", self.temperature)
        if temperature < 0:
            raise RequestError(f"temperature is {temperature} but must be 0 (greedy) or more")
        store("temperature", temperature)
        top_p = _number("top_p", self.top_p)
        if not 0 < top_p <= 1:
            raise RequestError(f"top_p is {top_p} but must lie in (0, 1]")
        store("top_p", top_p)
        store("top_k", max(0, _integer("top_k", self.top_k, low=-1, high=_INT32_MAX)))
        min_p = _number("min_p", self.min_p)
        if not 0 <= min_p <= 1:
            raise RequestError(f"min_p is {min_p} but must lie in [0, 1]")
        store("min_p", min_p)
        penalty = _number("repetition_penalty", self.repetition_penalty)
        if not 0.01 <= penalty <= 100:  # further out, float32 scores overflow
            raise RequestError(
                f"repetition_penalty is {penalty} but must lie in [0.01, 100] (1 is off)"
            )
        store("repetition_penalty", penalty)
        store("stop", _stop_strings(self.stop))
        store("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if self.seed is not None:
            _integer("seed", self.seed, low=-(2**63), high=2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _integer(name, count, low=0, high=MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r} but must be true or false")

    @property
    def greedy(self) -> bool:
        """Return whether the most probable token is taken rather than one drawn."""
        return self.temperature < _GREEDY_BELOW

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, for JSON or msgpack; `from_dict` makes an equal object of them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Read what `to_dict` gives, or any part of it; absent keys take their defaults.

        Raises:
            RequestError: an unknown key, or a value the class refuses.
        """
        if not isinstance(values, Mapping):
            raise RequestError(f"sampling params are {values!r} but must be an object of settings")
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise RequestError(f"unknown sampling params {unknown}; known are {known}")
        return cls(**values)


def _integer(name: str, value: object, *, low: int, high: int) -> int:
    """Return `value` as an int in low .. high; a bool is none here, though Python says it is."""
    allowed = f"from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r} but must be a whole number {allowed}")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value} but must be {allowed}")
    return value


def _number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r} but must be a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number past the largest float
        finite = False
    if not finite:
        raise RequestError(f"{name} is {value} but must be a finite number")
    return float(value)


def _stop_strings(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if isinstance(stops, list | tuple) and len(stops) > MAX_STOP:
        raise RequestError(f"stop has {len(stops)} texts but may have {MAX_STOP}")
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise RequestError(f"stop is {value!r} but must be a text or a list of texts")
    if "" in stops:
        raise RequestError(f"stop is {value!r} but an empty text would stop every output at once")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
        raise RequestError(
            f"stop has a text of {longest} characters but may have {MAX_STOP_CHARACTERS}"
        )
    return tuple(stops)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise RequestError(f"stop_token_ids is {value!r} but must be a list of token ids")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise RequestError(f"stop_token_ids has {len(value)} ids but may have {MAX_STOP_TOKEN_IDS}")
    return tuple(
        _integer(f"stop_token_ids[{i}]", each, low=0, high=_INT32_MAX)
        for i, each in enumerate(value)
    )
