"""Wrong requests are refused in the OpenAI API's shape, and harm no other request."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import openai
import pytest
from helpers.observed_engine import (
    MAX_LEN,
)
from helpers.openai_calls import MESSAGES, TEXT, complete, ids_of
from helpers.served import MODEL
from helpers.tiny_models import VOCAB
from openai import OpenAI

from cqil_dist.engine.engine import Engine
from cqil_dist.engine.request import Request
from cqil_dist.inputs import GenerationInput

# What is not as it should be.

MISTAKES: list[tuple[str, Any]] = [
    ("temperature", -1),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.5),
    ("n", 0),
    ("n", 129),
    ("n", "2"),
    ("n", 1.5),
    ("stop", 3),
    ("stop", ["a"] * 17),
    ("stop", ["a", 1]),
    ("seed", 2**63),
    ("seed", 1.5),
    ("stream_options", {"nonsense": True}),
    ("presence_penalty", 0.5),
    ("frequency_penalty", -0.5),
    ("logit_bias", {"5": 1}),
    ("top_k", -2),
    ("min_p", 1.1),
    ("repetition_penalty", 0),
    ("ignore_eos", 1),
    ("stop_token_ids", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [2**31]),
    ("stop_token_ids", [1] * 257),
    ("metadata", {"a": 1}),
    ("metadata", dict.fromkeys(map(str, range(65)), "x")),
    ("return_token_ids", "yes"),
    ("nonsense", 1),
]
OF_COMPLETIONS: list[tuple[str, Any]] = [
    ("max_tokens", -1),
    ("max_tokens", 2**31),
    ("logprobs", 21),
    ("logprobs", True),
    ("suffix", "!"),
    ("echo", "yes"),
    ("prompt", {}),
    ("prompt", 5),
    ("prompt", ["a", 1]),
    ("prompt", [1, -1]),
    ("prompt", [[1], [2, 2**31]]),
    ("messages", MESSAGES),
]
OF_CHAT: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_completion_tokens", 0),
    ("logprobs", 3),
    ("top_logprobs", 21),
    ("messages", []),
    ("messages", "hi"),
    ("messages", [{"role": "tool", "content": "x"}]),
    ("messages", [{"role": "assistant", "content": None}]),
    ("messages", [{"role": "user", "content": []}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    ("messages", [{"role": "user", "content": "x", "tool_calls": []}]),
    ("tools", [{"type": "function"}]),
    ("tool_choice", "required"),
    ("response_format", {"type": "json_object"}),
    ("echo", True),
]


def refusal(client: OpenAI, path: str, body: dict[str, Any]) -> Any:
    """The error that a request is refused with."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(path, body=body, cast_to=httpx.Response)
    error = caught.value
    assert error.type == "invalid_request_error"
    assert error.response.headers["content-type"] == "application/json"
    return error


@pytest.mark.parametrize(("field", "value"), [*MISTAKES, *OF_COMPLETIONS])
def test_a_mistake_in_a_completion_is_named(client: OpenAI, field: str, value: Any) -> None:
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 2, field: value}
    error = refusal(client, "/completions", body)
    assert error.param.split(".")[0] == field
    assert error.body["message"].startswith(field)


@pytest.mark.parametrize(("field", "value"), OF_CHAT)
def test_a_mistake_in_a_chat_is_named(client: OpenAI, field: str, value: Any) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, field: value}
    error = refusal(client, "/chat/completions", body)
    assert error.param.split(".")[0] == field
    assert error.body["message"].startswith(field)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is an empty list"),
        ({"prompt": [[1], []]}, "the prompt is empty"),
        ({"prompt": [VOCAB]}, "token ids [307] lie outside the vocabulary"),
        ({"prompt": [1] * MAX_LEN}, "the prompt has 64 tokens, but prompt and completion"),
        ({"prompt": ["x"] * 65, "n": 2}, "65 prompts with n=2 make 130 choices"),
        ({"stop": ["a", ""]}, "stop is ['a', '']"),
        ({"stop": "x" * 1025}, "stop has a text of 1025 characters but may have 1024"),
        ({"prompt": "x" * 150_000, "n": 128}, "128 choices of so long a prompt"),
        ({f"field_{i}": 0 for i in range(70)}, "it has 73 entries but may have 64"),
        ({"max_tokens": 0}, "max_tokens is 0, which is for scoring a prompt: set echo"),
        ({"echo": True, "stream": True}, "echo and stream are both set"),
        ({"best_of": 2}, "best_of is 2 but only n (1) is supported"),
    ],
)
def test_values_that_do_not_go_together_are_named(
    client: OpenAI, changes: dict[str, Any], message: str
) -> None:
    for streamed in (False, True):
        body = {"model": MODEL, "prompt": TEXT, "stream": streamed, **changes}
        assert message in refusal(client, "/completions", body).body["message"]


def test_one_prompt_in_error_is_named_before_others_stream(
    client: OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, begun = engine.submit, threading.Event()

    def submit_later(given: GenerationInput) -> Request:
        if not given.prompt:
            assert begun.wait(30)
            time.sleep(0.2)  # chunks of the other prompt have had their time to arrive
            return submit(given)
        request = submit(given)
        begun.set()
        return request

    monkeypatch.setattr(engine, "submit", submit_later)
    body = {"model": MODEL, "prompt": [[1], []], "stream": True}
    assert "the prompt is empty" in refusal(client, "/completions", body).body["message"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_logprobs": 2}, "top_logprobs is set, but not logprobs"),
        ({"max_completion_tokens": 3}, "max_tokens is 2 and max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 99}]}, "the prompt has"),
        ({"messages": [{"role": "user", "content": ""}] * 65}, "the conversation has 65 messages"),
    ],
)
def test_values_of_a_chat_that_do_not_go_together_are_named(
    client: OpenAI, changes: dict[str, Any], message: str
) -> None:
    for streamed in (False, True):
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "stream": streamed}
        error = refusal(client, "/chat/completions", {**body, **changes})
        assert message in error.body["message"]


def test_after_all_of_them_a_good_one_is_answered(client: OpenAI) -> None:
    """This is the last test of the module, after all the refusals."""
    assert len(ids_of(complete(client, TEXT, max_tokens=3, return_token_ids=True).choices[0])) > 0
