"""The Ray actor around the engine: connects to the ranks and serves requests over gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
import torch

from cqil_dist.exchange.handshake import COORDINATOR
from cqil_dist.exchange.link import Link
from cqil_dist.exchange.listener import connect
from cqil_dist.model.checkpoint import Checkpoint, parse_dtype
from cqil_dist.model.head import Embedding
from cqil_dist.outputs import RankStatus, Status
from cqil_dist.runtime.engine import Engine
from cqil_dist.runtime.rank_group import RankGroup
from cqil_dist.runtime.spec import EngineSpec
from cqil_dist.serving.grpc_server import GenerationServicer, start_server

if TYPE_CHECKING:
    import grpc


# Streams beyond the KV slots wait in the engine's queue; this many may wait.
_QUEUED_STREAMS = 256


class Coordinator:
    """Embeds, schedules, samples and detokenises. Its methods are called through Ray."""

    def __init__(self) -> None:
        self._ranks: RankGroup | None = None
        self._engine: Engine | None = None
        self._server: grpc.Server | None = None

    def load(self, spec: EngineSpec) -> None:
        """Read the tokenizer and the embedding."""
        from transformers import AutoTokenizer

        torch.set_num_threads(1)  # the ranks want the cores
        self._spec = spec
        self._tokenizer = AutoTokenizer.from_pretrained(spec.model_path)
        checkpoint = Checkpoint(spec.model_path)
        self._embedding = Embedding(spec.config, checkpoint, parse_dtype(spec.dtype))

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
        links: list[Link] = []
        for rank, address in sorted(addresses.items()):
            sock = connect(address, COORDINATOR, rank, secret, epoch, deadline_s)
            links.append(Link(sock, rank, address, spec.max_message_bytes))
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
        self._descriptions = tuple(RankStatus(**description) for description in descriptions)
        self._server, address = start_server(
            GenerationServicer(self._engine, self.status),
            host,
            secret,
            spec.slots + _QUEUED_STREAMS,
        )
        return address

    def status(self) -> Status:
        """What is served, and how busy the engine is."""
        assert self._engine is not None, "started"
        counts: dict[str, Any] = self._engine.status()
        return Status(
            model=self._spec.model,
            plan=self._spec.assignment.plan.to_json(),
            ranks=self._descriptions,
            max_len=self._spec.max_len,
            **counts,
        )

    def close(self) -> None:
        """Fail unfinished requests, stop serving and let the ranks go. Idempotent."""
        if self._engine is not None:
            self._engine.close()
        if self._server is not None:
            self._server.stop(grace=1).wait()
        if self._ranks is not None:
            self._ranks.close()
