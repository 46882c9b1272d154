"""Requests of the OpenAI API, turned into requests of the service: one for each choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cqil_dist.errors import RequestError
from cqil_dist.inputs import Prompt
from cqil_dist.rpc.convert import request_to_wire
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.serving.openai_api.schema import (
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
)

# A bound on the characters, token ids and messages of the prompts of all choices together: each
# choice is a request of its own, with a copy of its prompt.
_MAX_PROMPT_SIZE = 1 << 24

_GIVEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids")


def completion_requests(body: CompletionRequest, response_id: str) -> list[pb.GenerateRequest]:
    """Make the service's requests for the choices of /v1/completions, `n` for each prompt in turn.

    Their ids are made from `response_id`.

    Raises:
        RequestError: a value is unsupported or out of range.
    """
    prompts = _prompts(body.prompt)
    if body.best_of not in (None, body.n):
        raise RequestError(f"best_of is {body.best_of} but only n ({body.n}) is supported")
    if len(prompts) * body.n > MAX_CHOICES:
        raise RequestError(
            f"{len(prompts)} prompts with n={body.n} make {len(prompts) * body.n} choices, but a "
            f"request may have {MAX_CHOICES}; send several requests"
        )
    if body.echo and body.stream:
        raise RequestError("echo and stream are both set, but a prompt is not echoed in a stream")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens is 0, which is for scoring a prompt: set echo as well")
    sampling = _sampling(body)
    if body.max_tokens is not None:
        sampling["max_tokens"] = body.max_tokens
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
        if body.echo:
            sampling["prompt_logprobs"] = body.logprobs
    return _requests(body, prompts, sampling, response_id)


def chat_requests(
    body: ChatCompletionRequest, response_id: str, max_len: int
) -> list[pb.GenerateRequest]:
    """Make the service's requests for the `n` choices of /v1/chat/completions.

    Their ids are made from `response_id`; `max_len`, the model's context in tokens, is the default
    of `max_tokens`. Raises RequestError if a value is unsupported or out of range.
    """
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise RequestError(
            f"max_tokens is {body.max_tokens} and max_completion_tokens, its newer name, is "
            f"{body.max_completion_tokens}; give one"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs is set, but not logprobs, which it needs")
    sampling = _sampling(body)
    sampling["max_tokens"] = limits.pop() if limits else max_len
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    messages = [{"role": _role(message), "content": _text(message)} for message in body.messages]
    return _requests(body, [messages], sampling, response_id)


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise RequestError("the prompt is an empty list; give a text, token ids, or a list of them")
    if isinstance(given[0], int):
        return [[token_id for token_id in given if isinstance(token_id, int)]]
    return [prompt for prompt in given if not isinstance(prompt, int)]


def _sampling(body: GenerationRequest) -> dict[str, Any]:
    """Return the sampling values given in a request; the service fills in the model's defaults."""
    sampling = {name: value for name in _GIVEN if (value := getattr(body, name)) is not None}
    if body.stop is not None:
        sampling["stop"] = body.stop
    if body.ignore_eos:
        sampling["ignore_eos"] = True
    return sampling


def _requests(
    body: GenerationRequest, prompts: Sequence[Prompt], sampling: dict[str, Any], response_id: str
) -> list[pb.GenerateRequest]:
    """Make `n` requests for each prompt, which differ in their ids and seeds alone."""
    if body.n > 1 and body.n * sum(map(_size, prompts)) > _MAX_PROMPT_SIZE:
        raise RequestError(
            f"{body.n} choices of so long a prompt are too much for one request; send several"
        )
    requests: list[pb.GenerateRequest] = []
    for prompt in prompts:
        first = request_to_wire(
            prompt,
            final_only=not body.stream,
            model=body.model,
            echo=getattr(body, "echo", False),
            timeline=body.return_timeline and body.stream,
            **sampling,
        )
        for choice in range(body.n):
            request = pb.GenerateRequest(request_id=f"{response_id}-{len(requests)}")
            request.MergeFrom(first)
            if body.seed is not None:
                # A seed has 64 bits and a sign: seed + choice wraps around.
                seed = (body.seed + choice + 2**63) % 2**64 - 2**63
                request.sampling_params.seed = seed
            requests.append(request)
    return requests


def _size(prompt: Prompt) -> int:
    contents = (item["content"] for item in prompt if isinstance(item, dict))
    return len(prompt) + sum(map(len, contents))


def _role(message: Message) -> str:
    # "developer" is the newer name for "system", which chat templates do not know.
    return "system" if message.role == "developer" else message.role


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)
