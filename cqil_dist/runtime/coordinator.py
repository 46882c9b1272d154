"""The Ray actor around the engine: connects to the ranks and serves requests over gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from cqil_dist.assignment import Assignment
from cqil_dist.exchange.handshake import COORDINATOR
from cqil_dist.exchange.link import Link
from cqil_dist.exchange.listener import connect
from cqil_dist.model.checkpoint import Checkpoint, parse_dtype
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.head import Embedding
from cqil_dist.runtime.engine import Engine
from cqil_dist.runtime.rank_group import RankGroup
from cqil_dist.serving.grpc_server import (
    GenerationServicer,
    Served,
    rank_statuses,
    start_server,
)

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True)
class CoordinatorSpec:
    """What the coordinator is told.

    Attributes:
        model: the name it was launched by.
        slots: requests that run at the same time.
        prefill_tokens: most prompt tokens a step computes.
        streams: most calls at the same time; those beyond `slots` wait for a slot.
        step_deadline_s: seconds a step may take before a rank counts as lost.
    """

    model: str
    assignment: Assignment
    config: ModelConfig
    model_path: Path
    dtype: str
    slots: int
    max_len: int
    prefill_tokens: int
    streams: int
    step_deadline_s: float


class Coordinator:
    """Embeds, schedules, samples and detokenises. Its methods are called through Ray."""

    def __init__(self) -> None:
        self._ranks: RankGroup | None = None
        self._engine: Engine | None = None
        self._server: grpc.Server | None = None

    def load(self, spec: CoordinatorSpec) -> None:
        """Read the tokenizer and the embedding."""
        from transformers import AutoTokenizer

        torch.set_num_threads(1)  # the ranks want the cores
        self._spec = spec
        self._tokenizer = AutoTokenizer.from_pretrained(spec.model_path)
        checkpoint = Checkpoint(spec.model_path)
        self._embedding = Embedding(spec.config, checkpoint, parse_dtype(spec.dtype))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        token_ids: list[int] = self._tokenizer(text)["input_ids"]
        return token_ids

    def node_id(self) -> str:
        """Ray's id of the node this actor runs on."""
        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id

    def start(
        self,
        host: str,
        addresses: dict[int, str],
        secret: bytes,
        epoch: int,
        deadline_s: float,
        descriptions: list[dict[str, Any]],
    ) -> str:
        """Connect to the ranks' listeners and serve on `host`; returns the service's "host:port".

        Raises:
            ExchangeError: a rank cannot be reached.
        """
        spec = self._spec
        values = (spec.slots + spec.prefill_tokens) * max(
            spec.config.hidden_size, spec.config.vocab_size
        )
        links: list[Link] = []
        for rank, address in sorted(addresses.items()):
            sock = connect(address, COORDINATOR, rank, secret, epoch, deadline_s)
            links.append(Link(sock, rank, address, max_bytes=4 * values, spin_s=0.0))
        self._ranks = RankGroup(spec.assignment, self._embedding, links, spec.step_deadline_s)
        self._engine = Engine(
            self._ranks,
            self._tokenizer,
            spec.config.eos_token_ids,
            spec.config.vocab_size,
            max_len=spec.max_len,
            slots=spec.slots,
            prefill_tokens=spec.prefill_tokens,
        )
        ranks = self._ranks
        served = Served(
            spec.model, spec.assignment.plan, rank_statuses(descriptions), lambda: ranks.steps
        )
        self._server, address = start_server(
            GenerationServicer(self._engine, served),
            host,
            secret,
            spec.streams,
        )
        return address

    def close(self) -> None:
        """Fail unfinished requests, stop serving and let the ranks go. Idempotent."""
        if self._engine is not None:
            self._engine.close()
        if self._server is not None:
            self._server.stop(grace=1).wait()
        if self._ranks is not None:
            self._ranks.close()
