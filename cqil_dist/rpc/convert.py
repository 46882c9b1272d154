"""Between the package's own values and the messages of the wire.

Imports neither torch nor transformers, so that a client stays light.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields

from cqil_dist.errors import RequestError
from cqil_dist.outputs import (
    Chunk,
    Completion,
    EngineState,
    FinishReason,
    RankStatus,
    Recovery,
    Status,
    Timings,
    TokenLogprob,
    Usage,
)
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
"""Text, token ids, or chat messages with "role" and "content"."""

_LISTS = ("stop", "stop_token_ids")
_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
_STATES: dict[int, EngineState] = {
    pb.ENGINE_STATE_SERVING: "serving",
    pb.ENGINE_STATE_RECOVERING: "recovering",
    pb.ENGINE_STATE_FAILED: "failed",
}
_STATE_CODES = {state: code for code, state in _STATES.items()}


def request_to_wire(
    prompt: Prompt,
    params: SamplingParams,
    final_only: bool = False,
    resume_token_ids: Sequence[int] = (),
) -> pb.GenerateRequest:
    """Raises RequestError if the prompt is neither text, token ids nor chat messages."""
    try:
        wire = pb.GenerateRequest(
            sampling_params=params_to_wire(params),
            final_only=final_only,
            resume_token_ids=resume_token_ids,
        )
        if isinstance(prompt, str):
            wire.text = prompt
            return wire
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt or a stop string is not valid Unicode: {error}") from error
    if isinstance(prompt, bytes):
        raise RequestError("the prompt is bytes; decode it to text")
    if all(isinstance(item, int) and 0 <= item < 2**31 for item in prompt):
        wire.token_ids.ids.extend(item for item in prompt if isinstance(item, int))
        wire.token_ids.SetInParent()  # an empty list is still a list of token ids
    else:
        wire.chat.messages.extend(_message_to_wire(item) for item in prompt)
    return wire


def _message_to_wire(message: object) -> pb.ChatMessage:
    match message:
        case {"role": str(role), "content": str(content)}:
            return pb.ChatMessage(role=role, content=content)
    raise RequestError(
        f"the prompt holds {message!r}; give text, token ids (0 or more), or messages as "
        "{'role': 'user', 'content': '...'}"
    )


def params_to_wire(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(**params.to_dict())


def params_from_wire(wire: pb.SamplingParams) -> SamplingParams:
    """Fields that were not sent keep their defaults. Raises RequestError for bad values."""
    values = {
        field.name: list(value) if field.name in _LISTS else value
        for field, value in wire.ListFields()
    }
    return SamplingParams.from_dict(values)


def chunk_to_wire(chunk: Chunk) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=_logprobs_to_wire(chunk.logprobs or ()),
        completion=None if chunk.result is None else _completion_to_wire(chunk.result),
    )


def chunk_from_wire(wire: pb.GenerateResponse, wants_logprobs: bool) -> Chunk:
    result = None
    if wire.HasField("completion"):
        result = _completion_from_wire(wire.completion, wants_logprobs)
    return Chunk(
        text=wire.text,
        token_ids=tuple(wire.token_ids),
        logprobs=_logprobs_from_wire(wire.logprobs) if wants_logprobs else None,
        finish_reason=None if result is None else result.finish_reason,
        stop_reason=None if result is None else result.stop_reason,
        result=result,
    )


def status_to_wire(status: Status) -> pb.GetStatusResponse:
    values = asdict(status) | {
        "ranks": [pb.RankStatus(**asdict(rank)) for rank in status.ranks],
        "state": _STATE_CODES[status.state],
        "last_recovery": _recovery_to_wire(status.last_recovery),
    }
    return pb.GetStatusResponse(plan_json=json.dumps(values.pop("plan")), **values)


def status_from_wire(wire: pb.GetStatusResponse) -> Status:
    ranks = [
        RankStatus(**{field.name: getattr(rank, field.name) for field in fields(RankStatus)})
        for rank in wire.ranks
    ]
    return Status(
        model=wire.model,
        plan=json.loads(wire.plan_json),
        ranks=tuple(ranks),
        running_requests=wire.running_requests,
        waiting_requests=wire.waiting_requests,
        free_slots=wire.free_slots,
        slots=wire.slots,
        max_len=wire.max_len,
        steps=wire.steps,
        state=_STATES[wire.state],
        state_detail=wire.state_detail,
        epoch=wire.epoch,
        ready_spares=wire.ready_spares,
        recoveries=wire.recoveries,
        last_recovery=_recovery_from_wire(wire),
    )


def _recovery_to_wire(recovery: Recovery | None) -> pb.Recovery | None:
    if recovery is None:
        return None
    return pb.Recovery(
        cause=recovery.cause,
        seconds=recovery.seconds,
        phases=[pb.RecoveryPhase(name=n, seconds=s) for n, s in recovery.phases.items()],
    )


def _recovery_from_wire(wire: pb.GetStatusResponse) -> Recovery | None:
    if not wire.HasField("last_recovery"):
        return None
    recovery = wire.last_recovery
    phases = {phase.name: phase.seconds for phase in recovery.phases}
    return Recovery(recovery.cause, recovery.seconds, phases)


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
    )


def _completion_from_wire(wire: pb.Completion, wants_logprobs: bool) -> Completion:
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
        TokenLogprob(entry.token_id, entry.token, entry.logprob, _logprobs_from_wire(entry.top))
        for entry in wire
    )
