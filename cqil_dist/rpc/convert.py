"""Converts requests and their chunks between the package's own values and the wire's messages.

Imports neither torch nor transformers, so that a client stays light.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cqil_dist.errors import RequestError
from cqil_dist.inputs import GenerationInput, Prompt
from cqil_dist.outputs import Chunk, Completion, FinishReason, Timings, TokenLogprob, Usage
from cqil_dist.rpc.convert_timeline import timeline_from_wire, timeline_to_wire
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.sampling_params import SamplingParams

_LISTS = ("stop", "stop_token_ids")
_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


def request_to_wire(
    prompt: Prompt,
    *,
    final_only: bool = False,
    model: str = "",
    request_id: str = "",
    echo: bool = False,
    timeline: bool = False,
    **sampling: Any,
) -> pb.GenerateRequest:
    """Convert the arguments of `Client.generate`.

    Raises:
        RequestError: the prompt is neither text, token ids nor chat messages, or a sampling value
            is wrong.
    """
    try:
        wire = pb.GenerateRequest(
            sampling_params=sampling_to_wire(sampling),
            final_only=final_only,
            model=model,
            request_id=request_id,
            echo=echo,
            timeline=timeline,
        )
        if isinstance(prompt, str):
            wire.text = prompt
            return wire
        if isinstance(prompt, bytes):
            raise RequestError("the prompt is bytes; decode it to text")
        if all(isinstance(item, int) and 0 <= item < 2**31 for item in prompt):
            wire.token_ids.ids.extend(item for item in prompt if isinstance(item, int))
            wire.token_ids.SetInParent()  # an empty list is still a list of token ids
        else:
            wire.chat.messages.extend(_message_to_wire(item) for item in prompt)
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt or a stop string is not valid Unicode: {error}") from error
    return wire


def request_from_wire(
    wire: pb.GenerateRequest, plan_index: int, defaults: Mapping[str, Any]
) -> GenerationInput:
    """Convert a request into what an engine takes.

    Args:
        plan_index: index of the plan that `wire.model` stands for.
        defaults: sampling values where the request says nothing.

    Raises:
        RequestError: a sampling value is wrong.
    """
    return GenerationInput(
        prompt=_prompt_from_wire(wire),
        params=SamplingParams.from_dict({**defaults, **sampling_from_wire(wire.sampling_params)}),
        plan_index=plan_index,
        final_only=wire.final_only,
        resume_token_ids=tuple(wire.resume_token_ids),
        echo=wire.echo,
        wants_timeline=wire.timeline,
    )


def _prompt_from_wire(wire: pb.GenerateRequest) -> Prompt:
    kind = wire.WhichOneof("prompt")
    if kind == "chat":
        return [{"role": m.role, "content": m.content} for m in wire.chat.messages]
    if kind == "token_ids":
        return list(wire.token_ids.ids)
    return wire.text


def _message_to_wire(message: object) -> pb.ChatMessage:
    match message:
        case {"role": str(role), "content": str(content)}:
            return pb.ChatMessage(role=role, content=content)
    raise RequestError(
        f"the prompt holds {message!r}; give text, token ids (0 or more), or messages as "
        "{'role': 'user', 'content': '...'}"
    )


def sampling_to_wire(given: Mapping[str, Any]) -> pb.SamplingParams:
    """Convert the values that were given; the service fills in the rest. Raises RequestError."""
    checked = SamplingParams.from_dict(given).to_dict()
    return pb.SamplingParams(**{name: checked[name] for name in given})


def sampling_from_wire(wire: pb.SamplingParams) -> dict[str, Any]:
    """Read the values that were given, and no others."""
    return {
        field.name: list(value) if field.name in _LISTS else value
        for field, value in wire.ListFields()
    }


def chunk_to_wire(chunk: Chunk) -> pb.GenerateResponse:
    """Convert a chunk into a response of the stream."""
    return pb.GenerateResponse(
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=None if chunk.logprobs is None else _logprobs_to_wire(chunk.logprobs),
        completion=None if chunk.result is None else _completion_to_wire(chunk.result),
        timeline=None if chunk.timeline is None else timeline_to_wire(chunk.timeline),
    )


def chunk_from_wire(
    wire: pb.GenerateResponse, wants_logprobs: bool, wants_prompt_logprobs: bool
) -> Chunk:
    """Convert a response of the stream into a chunk.

    The wire does not tell an empty list from none: lists that were asked for may be empty, others
    are None.
    """
    result = None
    if wire.HasField("completion"):
        result = _completion_from_wire(wire.completion, wants_logprobs, wants_prompt_logprobs)
    return Chunk(
        text=wire.text,
        token_ids=tuple(wire.token_ids),
        logprobs=_logprobs_from_wire(wire.logprobs) if wants_logprobs else None,
        finish_reason=None if result is None else result.finish_reason,
        stop_reason=None if result is None else result.stop_reason,
        result=result,
        timeline=timeline_from_wire(wire.timeline) if wire.HasField("timeline") else None,
    )


def _completion_to_wire(completion: Completion) -> pb.Completion:
    reason = completion.stop_reason
    return pb.Completion(
        text=completion.text,
        token_ids=completion.token_ids,
        logprobs=_logprobs_to_wire(completion.logprobs or ()),
        finish_reason=completion.finish_reason,
        stop_string=reason if isinstance(reason, str) else None,
        stop_token_id=reason if isinstance(reason, int) else None,
        prompt_tokens=completion.usage.prompt_tokens,
        timings=pb.Timings(ttft_ms=completion.timings.ttft_ms, itl_ms=completion.timings.itl_ms),
        seed=completion.seed,
        prompt_logprobs=_logprobs_to_wire(completion.prompt_logprobs or ()),
        prompt_text=completion.prompt_text,
    )


def _completion_from_wire(
    wire: pb.Completion, wants_logprobs: bool, wants_prompt_logprobs: bool
) -> Completion:
    stop_reason: str | int | None = None
    if wire.HasField("stop_string"):
        stop_reason = wire.stop_string
    elif wire.HasField("stop_token_id"):
        stop_reason = wire.stop_token_id
    return Completion(
        text=wire.text,
        token_ids=tuple(wire.token_ids),
        finish_reason=_FINISH_REASONS[wire.finish_reason],
        usage=Usage(wire.prompt_tokens, len(wire.token_ids)),
        timings=Timings(wire.timings.ttft_ms, tuple(wire.timings.itl_ms)),
        logprobs=_logprobs_from_wire(wire.logprobs) if wants_logprobs else None,
        seed=wire.seed,
        stop_reason=stop_reason,
        prompt_logprobs=_logprobs_from_wire(wire.prompt_logprobs)
        if wants_prompt_logprobs
        else None,
        prompt_text=wire.prompt_text if wire.HasField("prompt_text") else None,
    )


def _logprobs_to_wire(logprobs: Iterable[TokenLogprob]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=entry.token_id,
            token=entry.token,
            logprob=entry.logprob,
            top=_logprobs_to_wire(entry.top),
        )
        for entry in logprobs
    ]


def _logprobs_from_wire(wire: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            entry.token_id,
            entry.token,
            entry.logprob if entry.HasField("logprob") else None,
            _logprobs_from_wire(entry.top),
        )
        for entry in wire
    )
