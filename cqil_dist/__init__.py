"""Low-latency generation: quasi-independent layers of a language model are computed concurrently.

import cqil_dist as cqil

with cqil.launch("smollm2-135m", plan="P2 S12 E28 D0", ranks=2) as engine:
    for chunk in engine.generate("The capital of France is", max_tokens=32, temperature=0):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cqil_dist.errors import (
    CheckpointError,
    ConfigError,
    CqilError,
    ExchangeError,
    InsufficientResources,
    LaunchError,
    ModelError,
    ModelNotFound,
    PeerLost,
    PlanError,
    ProtocolError,
    QueueFull,
    RankUnavailable,
    RequestError,
    RequestTimeout,
    ServiceError,
    ServiceUnavailable,
    TextError,
    Unauthenticated,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from cqil_dist.client import AsyncClient, Client
    from cqil_dist.launching.config import LaunchConfig
    from cqil_dist.launching.running_engine import RunningEngine, launch
    from cqil_dist.outputs import Chunk, Completion, Timings, TokenLogprob, Usage
    from cqil_dist.plan import Bypass, Group, Plan
    from cqil_dist.sampling_params import SamplingParams
    from cqil_dist.status import ModelInfo, RankStatus, Recovery, Status

# The modules of the other public names, which are imported when a name is first used: ranks need
# neither Ray's driver side nor transformers, and a client needs no torch.
_HOMES = {
    "cqil_dist.client": ("AsyncClient", "Client"),
    "cqil_dist.launching.config": ("LaunchConfig",),
    "cqil_dist.launching.running_engine": ("RunningEngine", "launch"),
    "cqil_dist.outputs": ("Chunk", "Completion", "Timings", "TokenLogprob", "Usage"),
    "cqil_dist.plan": ("Bypass", "Group", "Plan"),
    "cqil_dist.sampling_params": ("SamplingParams",),
    "cqil_dist.status": ("ModelInfo", "RankStatus", "Recovery", "Status"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncClient",
    "Bypass",
    "CheckpointError",
    "Chunk",
    "Client",
    "Completion",
    "ConfigError",
    "CqilError",
    "ExchangeError",
    "Group",
    "InsufficientResources",
    "LaunchConfig",
    "LaunchError",
    "ModelError",
    "ModelInfo",
    "ModelNotFound",
    "PeerLost",
    "Plan",
    "PlanError",
    "ProtocolError",
    "QueueFull",
    "RankStatus",
    "RankUnavailable",
    "Recovery",
    "RequestError",
    "RequestTimeout",
    "RunningEngine",
    "SamplingParams",
    "ServiceError",
    "ServiceUnavailable",
    "Status",
    "TextError",
    "Timings",
    "TokenLogprob",
    "Unauthenticated",
    "UnsupportedModel",
    "Usage",
    "launch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME_OF[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("cqil_dist"):
            raise
        raise ImportError(
            f"cqil_dist.{name} needs {error.name}, which a client goes without: install "
            "cqil-dist[runtime]"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
