"""Launching over several nodes, and streams from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faults.hosts import Host, Network
from faults.remote import RemoteEngine, RemoteStream

PLAN = "P2 S0 E6 D1"
MAX_LEN = 3000
PROMPT = [5, 6, 7, 8, 9]
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.9, "top_p": 0.95, "seed": 3},
)


def launch(network: Network, path: Path, **options: Any) -> RemoteEngine:
    defaults = {
        "model": str(path),
        "plan": PLAN,
        "ranks": 2,
        "strategy": "STRICT_SPREAD",
        "address": "auto",
        "max_len": MAX_LEN,
        # A healthy rank answers within this also where all hosts share a few cores.
        "step_deadline_s": 10,
    }
    return RemoteEngine(network.hosts[0], **{**defaults, **options})


def stream(engine: RemoteEngine, sampling: dict[str, Any], tokens: int = 900) -> RemoteStream:
    return engine.stream(PROMPT, max_tokens=tokens, ignore_eos=True, **sampling)


def host_of(network: Network, rank: dict[str, Any]) -> Host:
    return network.host_at(rank["address"])
