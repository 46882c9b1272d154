"""Defines what a service says of itself: what it offers, and how it is doing.

These are plain frozen values, as in outputs.py, which has what a single request gives back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cqil_dist.errors import ModelNotFound

EngineState = Literal["serving", "recovering", "failed"]


@dataclass(frozen=True)
class RankStatus:
    """A description of one rank of a running engine.

    Attributes:
        node_id: Ray's id of its node.
        address: the node's address in the cluster.
        device: "cpu" or "cuda".
        weight_bytes, kv_bytes: memory of its weights and of its KV cache.
    """

    rank: int
    node_id: str
    address: str
    pid: int
    device: str
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class Recovery:
    """The record of how the ranks came together again after one was lost.

    Attributes:
        cause: what was lost, and how that was noticed.
        seconds: from noticing the loss to the first step computed since, or to being ready for one.
        phases: seconds of each phase: "seat" (every rank has a live actor), "load" (it has its
            weights), "connect" (the ranks are connected), "prefill" (a step has been computed).
    """

    cause: str
    seconds: float
    phases: dict[str, float]

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items())
        return f"recovered in {self.seconds:.2f} s ({phases}) from: {self.cause}"


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """A description of how busy an engine is, and whether it can compute.

    Attributes:
        state: "recovering" while requests wait for a lost rank to be replaced, "failed" once the
            engine has given up.
        state_detail: what is waited for, or why it gave up.
        recoveries: how often since the coordinator started; `last_recovery` is the latest.
        running_requests, waiting_requests: those that hold a slot, and those that wait for one.
        max_waiting: most requests that may wait for a slot.
        steps: number of steps computed since the coordinator started.
    """

    state: EngineState
    state_detail: str
    recoveries: int
    last_recovery: Recovery | None
    running_requests: int
    waiting_requests: int
    free_slots: int
    slots: int
    max_waiting: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Status(EngineStatus):
    """A description of what an engine serves, on which ranks, and of how busy it is.

    Attributes:
        plan: as `Plan.to_json` gives it.
        max_len: most tokens a prompt and its completion may have together.
        epoch: number of the mesh that the ranks form, from 0; attempts that failed count.
        ready_spares: standby actors that hold the weights of every rank.
    """

    model: str
    plan: dict[str, Any]
    ranks: tuple[RankStatus, ...]
    max_len: int
    epoch: int
    ready_spares: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelInfo:
    """A model under a plan, as a service offers it.

    Attributes:
        name: what requests call it.
        plan: as `Plan.to_json` gives it.
        exchanges_per_token: how often the ranks exchange tensors for one decoded token.
        max_len: most tokens a prompt and its completion may have together.
        dtype: "float32", "float16" or "bfloat16".
        default_sampling: sampling values that requests get where they say nothing, from the
            model's generation_config.json.
        created: Unix time at which the coordinator started.
    """

    name: str
    plan: dict[str, Any]
    exchanges_per_token: int
    max_len: int
    vocab_size: int
    dtype: str
    default_sampling: dict[str, Any]
    has_chat_template: bool
    created: int


def find_model(models: Sequence[ModelInfo], name: str) -> ModelInfo:
    """Find the model of this name; an empty name stands for the first. Raises ModelNotFound."""
    for model in models:
        if name in ("", model.name):
            return model
    served = ", ".join(model.name for model in models)
    raise ModelNotFound(f"model {name!r} is not served here; served: {served}")
