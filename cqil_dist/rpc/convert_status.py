"""Converts what a service offers, and how it is doing, to and from the wire's messages."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields

from cqil_dist.rpc.convert import sampling_from_wire
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.status import EngineState, ModelInfo, RankStatus, Recovery, Status

_STATES: dict[int, EngineState] = {
    pb.ENGINE_STATE_SERVING: "serving",
    pb.ENGINE_STATE_RECOVERING: "recovering",
    pb.ENGINE_STATE_FAILED: "failed",
}
_STATE_CODES = {state: code for code, state in _STATES.items()}


def models_to_wire(models: Iterable[ModelInfo]) -> pb.GetModelInfoResponse:
    """Convert the models that a service offers, in its order."""
    return pb.GetModelInfoResponse(models=[_model_to_wire(model) for model in models])


def models_from_wire(wire: pb.GetModelInfoResponse) -> tuple[ModelInfo, ...]:
    """Read the models that a service offers, in its order."""
    return tuple(_model_from_wire(model) for model in wire.models)


def _model_to_wire(model: ModelInfo) -> pb.ModelInfo:
    values = asdict(model)
    return pb.ModelInfo(
        plan_json=json.dumps(values.pop("plan")),
        default_sampling_params=pb.SamplingParams(**values.pop("default_sampling")),
        **values,
    )


def _model_from_wire(wire: pb.ModelInfo) -> ModelInfo:
    return ModelInfo(
        name=wire.name,
        plan=json.loads(wire.plan_json),
        exchanges_per_token=wire.exchanges_per_token,
        max_len=wire.max_len,
        vocab_size=wire.vocab_size,
        dtype=wire.dtype,
        default_sampling=sampling_from_wire(wire.default_sampling_params),
        has_chat_template=wire.has_chat_template,
        created=wire.created,
    )


def status_to_wire(status: Status) -> pb.GetStatusResponse:
    """Convert the status of an engine."""
    values = asdict(status) | {
        "ranks": [pb.RankStatus(**asdict(rank)) for rank in status.ranks],
        "state": _STATE_CODES[status.state],
        "last_recovery": _recovery_to_wire(status.last_recovery),
    }
    return pb.GetStatusResponse(plan_json=json.dumps(values.pop("plan")), **values)


def status_from_wire(wire: pb.GetStatusResponse) -> Status:
    """Read the status of an engine."""
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
        max_waiting=wire.max_waiting,
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
