"""The Ray actor around the engine: brings the ranks together and serves requests over gRPC.

It survives the loss of ranks, and of itself: started again by Ray, it takes over the ranks as it
finds them, weights and all, and clients resume their streams. What it needs for that are the
arguments that Ray creates it with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
import torch

from cqil_dist.coordinator.metrics import EngineMetrics
from cqil_dist.coordinator.node_addresses import host_addresses
from cqil_dist.coordinator.recovery import RankPool
from cqil_dist.coordinator.rendezvous import ConnectedRanks
from cqil_dist.coordinator.service import EngineServicer, start_server
from cqil_dist.engine.engine import Engine
from cqil_dist.errors import CqilError, ExchangeError
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.head import Embedding
from cqil_dist.rank.model_files import model_directory
from cqil_dist.rank.protocol import RemoteRanks
from cqil_dist.rank.spec import EngineSpec
from cqil_dist.rpc.options import OTHER_CALLS
from cqil_dist.status import ModelInfo, Status
from cqil_dist.store.generation_defaults import default_sampling
from cqil_dist.store.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import grpc
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Coordinator:
    """The actor that embeds, schedules, samples and detokenises, with the ranks' help.

    Its methods are called through Ray.

    Args:
        secret: the launch's.
        actors: names of the layer actors, spare ones included.
    """

    def __init__(self, spec: EngineSpec, secret: bytes, actors: Sequence[str]) -> None:
        self._spec = spec
        self._secret = secret
        self._pool = RankPool([*_living_actors(actors)], spec, secret)
        self._starting = threading.Lock()
        self._address: str | None = None
        self._engine: Engine | None = None
        self._server: grpc.Server | None = None
        self._group: RemoteRanks | None = None
        self._ranks: ConnectedRanks | None = None
        self._metrics = EngineMetrics()
        self._created = int(time.time())
        if ray.get_runtime_context().was_current_actor_reconstructed:
            # Nobody may ask for a while, and then everybody waits.
            threading.Thread(target=self._start_again, name="start", daemon=True).start()

    def start(self) -> str:
        """Bring the ranks together and serve, unless that is done; returns "host:port".

        Raises:
            ModelError, LaunchError, RankUnavailable: the ranks could not come together.
        """
        with self._starting:
            if self._address is None:
                torch.set_num_threads(1)  # the ranks want the cores
                with ThreadPoolExecutor(1) as own:
                    loading = own.submit(self._load)
                    ranks, _ = self._pool.assemble()
                    tokenizer, self._embedding = loading.result()
                self._address = self._serve(tokenizer, self._connected(ranks))
            return self._address

    def status(self) -> Status:
        """Say what is served, and how busy the engine is."""
        assert self._engine is not None, "started"
        assert self._ranks is not None, "started"
        engine = self._engine.status()
        if engine.state == "recovering" and self._pool.waiting_for:
            detail = f"{engine.state_detail}; waiting for {self._pool.waiting_for}"
            engine = replace(engine, state_detail=detail)
        return Status(
            model=self._spec.names[0],
            plan=self._spec.assignments[0].plan.to_json(),
            ranks=self._ranks.descriptions,
            max_len=self._spec.engine.max_len,
            epoch=self._ranks.epoch,
            ready_spares=self._pool.ready_spares(),
            **vars(engine),
        )

    def exchange_stats(self) -> list[dict[str, Any]]:
        """Return the counters and latest waits of each rank's exchange in this epoch."""
        assert self._ranks is not None, "started"
        stats: list[dict[str, Any]] = ray.get(
            [actor.exchange_stats.remote() for actor in self._ranks.actors], timeout=30
        )
        return stats

    def close(self) -> None:
        """Fail unfinished requests, stop serving and disconnect the ranks. Idempotent."""
        self._pool.stop()
        self._metrics.stop()
        if self._engine is not None:
            self._engine.close()
        if self._server is not None:
            self._server.stop(grace=1).wait()
        if self._group is not None:
            self._group.close()

    def _start_again(self) -> None:
        try:
            self.start()
        except CqilError:
            logger.exception("started again by Ray, but the ranks did not come together")

    def _load(self) -> tuple[PreTrainedTokenizerBase, Embedding]:
        spec = self._spec
        path = model_directory(spec.model, spec.model_path)
        embedding = Embedding(spec.config, Checkpoint(path), spec.precision.wire_dtype)
        return load_tokenizer(path), embedding

    def _connected(self, ranks: ConnectedRanks) -> RemoteRanks:
        spec = self._spec
        self._ranks = ranks
        self._group = RemoteRanks(
            spec.assignments, self._embedding, ranks.links, spec.engine.step_deadline_s
        )
        return self._group

    def _serve(self, tokenizer: PreTrainedTokenizerBase, group: RemoteRanks) -> str:
        spec = self._spec
        self._engine = Engine(
            group,
            tokenizer,
            spec.config.eos_token_ids,
            spec.config.vocab_size,
            spec.engine,
            rebuild=self._rebuild,
            on_recovery=self._metrics.note_recovery,
        )
        self._metrics.watch(self._engine.status)
        models = self._models(bool(getattr(tokenizer, "chat_template", None)))
        self._server, address = start_server(
            EngineServicer(self._engine, models, self.status, self._metrics.note_completion),
            host_addresses()[ray.get_runtime_context().get_node_id()],
            self._secret.hex(),
            spec.engine.max_requests + OTHER_CALLS,
        )
        return address

    def _models(self, has_chat_template: bool) -> list[ModelInfo]:
        spec = self._spec
        defaults = default_sampling(model_directory(spec.model, spec.model_path))
        return [
            ModelInfo(
                name=name,
                plan=assignment.plan.to_json(),
                exchanges_per_token=assignment.rounds,
                max_len=spec.engine.max_len,
                vocab_size=spec.config.vocab_size,
                dtype=spec.precision.weights,
                default_sampling=defaults,
                has_chat_template=has_chat_template,
                created=self._created,
            )
            for name, assignment in zip(spec.names, spec.assignments, strict=True)
        ]

    def _rebuild(self, error: ExchangeError) -> tuple[RemoteRanks, dict[str, float]]:
        """Bring the ranks together again; the engine calls it (`engine.Rebuild`)."""
        assert self._group is not None, "it has failed"
        ended = self._group.closed_ranks()
        self._group.close()
        ranks, phases = self._pool.assemble(frozenset(ended))
        return self._connected(ranks), phases


def _living_actors(names: Sequence[str]) -> Iterator[Any]:
    """Handles of the actors that Ray has not given up."""
    for name in names:
        try:
            yield ray.get_actor(name)
        except ValueError as error:
            logger.error("%s", error)
