"""Calls through the `openai` package, and their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from helpers.observed_engine import PLAN
from helpers.served import MODEL, Served
from helpers.tiny_models import TinyModel
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from torch import Tensor

ORIGINAL = "tiny-original"  # the same weights under the sequential plan
TEXT = "The harbour lies by the sea"
OTHERS = ("every morning", "The town")
MESSAGES: list[Any] = [
    {"role": "system", "content": "Go on."},
    {"role": "user", "content": "Is it far?"},
]
# Fields that the methods of `openai` do not have.
EXTRAS = (
    *("top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids"),
    *("return_token_ids", "return_timeline"),
)
# Optional fields of OpenAI's completions.
OPTIONAL = (
    *("n", "stop", "seed", "stream", "echo", "max_tokens", "logprobs", "top_p", "user", "suffix"),
    *("best_of", "presence_penalty", "frequency_penalty", "logit_bias", "stream_options"),
)
PACE_S = 0.02  # a whole context takes a second


def openai_of(service: Served, **options: Any) -> OpenAI:
    url = f"{service.addresses.http}/v1"
    return OpenAI(
        **{"base_url": url, "api_key": "unasked", "max_retries": 0, "timeout": 30, **options}
    )


def arguments(options: dict[str, Any]) -> dict[str, Any]:
    """A request's fields as the methods of `openai` take them."""
    known = {name: value for name, value in options.items() if name not in EXTRAS}
    extra = {name: value for name, value in options.items() if name in EXTRAS}
    return {"model": MODEL, **known, "extra_body": extra}


def complete(client: OpenAI, prompt: Any, **options: Any) -> Completion:
    answer = client.completions.create(prompt=prompt, **arguments(options))
    assert isinstance(answer, Completion)
    return answer


def stream(client: OpenAI, prompt: Any, **options: Any) -> list[Completion]:
    return list(client.completions.create(prompt=prompt, stream=True, **arguments(options)))


def chat(client: OpenAI, messages: Any, **options: Any) -> ChatCompletion:
    answer = client.chat.completions.create(messages=messages, **arguments(options))
    assert isinstance(answer, ChatCompletion)
    return answer


def chat_stream(client: OpenAI, messages: Any, **options: Any) -> list[ChatCompletionChunk]:
    return list(
        client.chat.completions.create(messages=messages, stream=True, **arguments(options))
    )


def ids_of(choice: Any) -> list[int]:
    ids: list[int] = choice.model_extra["token_ids"]
    return ids


def text_of(events: Sequence[Completion], index: int = 0) -> str:
    return "".join(
        choice.text for event in events for choice in event.choices if choice.index == index
    )


def prompt_ids(model: TinyModel, text: str) -> list[int]:
    ids: list[int] = model.tokenizer(text)["input_ids"]
    return ids


def expected_logprobs(model: TinyModel, name: str, ids: Sequence[int]) -> Tensor:
    """The expected log probabilities [T - 1, V] after each token but the last."""
    if name == ORIGINAL:
        logits = model.original_logits(ids)
    else:
        logits = model.reference_logits(model.plan(PLAN), ids)
    return logits[:-1].log_softmax(-1)
