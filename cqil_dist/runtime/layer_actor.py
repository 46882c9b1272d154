"""The Ray actor around one rank: loads its layers, joins the mesh, serves steps on a thread.

Ray places it, starts it and asks it questions. Tokens do not pass through Ray: steps come over
the coordinator's link, and partial results over the exchange.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass
from typing import Any

import ray
import torch

from cqil_dist.errors import ModelNotFound, PeerLost
from cqil_dist.exchange.base import Exchange
from cqil_dist.exchange.handshake import COORDINATOR
from cqil_dist.exchange.link import Link
from cqil_dist.exchange.listener import Listener, connect_mesh
from cqil_dist.exchange.sockets import format_address
from cqil_dist.exchange.tcp import TcpExchange
from cqil_dist.exchange.torch_distributed import TorchDistributedExchange
from cqil_dist.model.checkpoint import Checkpoint, parse_dtype
from cqil_dist.runtime.rank import RankProgram
from cqil_dist.runtime.rank_group import serve_steps
from cqil_dist.runtime.resident_memory import (
    freed_memory_returned,
    release_import_time_code,
)
from cqil_dist.runtime.spec import EngineSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeshSpec:
    """How the ranks of one epoch meet.

    Attributes:
        addresses: each rank's listener, "host:port".
        nccl_address: where ranks with a GPU each meet for NCCL; None for partial sums over TCP.
        cores: cores this rank's compute thread is bound to; empty leaves it free.
        spin_s: seconds to poll for a peer's frame before sleeping.
    """

    addresses: dict[int, str]
    secret: bytes
    epoch: int
    nccl_address: str | None
    cores: tuple[int, ...]
    spin_s: float
    deadline_s: float


class LayerActor:
    """One rank. Its methods are called through Ray, from several threads."""

    def __init__(self, rank: int, device: str) -> None:
        self.rank = rank
        self._device = torch.device(device)
        self._stages_loaded = 0
        self._program: RankProgram | None = None
        self._spec: EngineSpec | None = None
        self._listener: Listener | None = None
        self._link: Link | None = None
        self._exchange: Exchange | None = None
        self._thread: threading.Thread | None = None

    def place(self) -> dict[str, Any]:
        """Where this rank runs; `cores` are those its process may use."""
        gpus = ray.get_gpu_ids()
        return {
            "node_id": ray.get_runtime_context().get_node_id(),
            "cores": sorted(os.sched_getaffinity(0)),
            "gpu": str(gpus[0]) if gpus else None,
        }

    def load(self, spec: EngineSpec) -> None:
        """Read this rank's weights.

        Raises:
            ModelNotFound: this node has no such directory.
            CheckpointError: naming what is wrong with the weights.
        """
        if not spec.model_path.is_dir():
            raise ModelNotFound(
                f"rank {self.rank}'s node {ray.util.get_node_ip_address()} has no directory "
                f"{spec.model_path}; fetch or copy the model there, at the same path on every node"
            )
        torch.set_num_threads(spec.threads)
        self._spec = spec
        release_import_time_code()
        with freed_memory_returned():
            self._program = RankProgram(
                self.rank,
                spec.assignment,
                spec.config,
                Checkpoint(spec.model_path),
                spec.cache_shape,
                parse_dtype(spec.dtype),
                self._device,
                on_stage_loaded=self._count_stage,
            )

    def stages_loaded(self) -> int:
        """Progress of `load`."""
        return self._stages_loaded

    def describe(self) -> dict[str, Any]:
        """Identity, place and memory of this rank, as in the service's `RankStatus`."""
        assert self._program is not None, "described after loading"
        place = self.place()
        return {
            "rank": self.rank,
            "node_id": place["node_id"],
            "pid": os.getpid(),
            "device": str(self._device),
            "weight_bytes": self._program.weight_bytes,
            "kv_bytes": self._program.kv_bytes,
        }

    def listen(self, host: str, secret: bytes, epoch: int) -> str:
        """Open this rank's port on `host`, its node's cluster address; returns "host:port"."""
        self._listener = Listener(host, secret, epoch)
        return self._listener.address

    def free_address(self, host: str) -> str:
        """A free "host:port" on this rank's node, for NCCL's rendezvous."""
        with socket.socket() as sock:
            sock.bind((host, 0))
            return format_address(sock.getsockname())

    def join(self, mesh: MeshSpec) -> None:
        """Connect to every peer and the coordinator, and start serving steps.

        Raises:
            PeerLost: a peer or the coordinator did not connect in time.
        """
        assert self._listener is not None, "listens before it joins"
        assert self._spec is not None, "loads before it joins"
        with self._listener as listener:
            sockets = connect_mesh(
                listener,
                self.rank,
                mesh.addresses,
                mesh.secret,
                mesh.epoch,
                mesh.deadline_s,
                extra={COORDINATOR},
            )
        coordinator = sockets.pop(COORDINATOR)
        spec = self._spec
        self._link = Link(
            coordinator,
            COORDINATOR,
            format_address(coordinator.getpeername()),
            spec.max_message_bytes,
        )
        if mesh.nccl_address is not None:
            for sock in sockets.values():
                sock.close()
            self._exchange = TorchDistributedExchange(
                self.rank,
                spec.assignment.world,
                "nccl",
                mesh.nccl_address,
                parse_dtype(spec.dtype),
                self._device,
                spec.step_deadline_s,
            )
        else:
            self._exchange = TcpExchange(
                self.rank,
                sockets,
                mesh.addresses,
                parse_dtype(spec.dtype),
                self._device,
                max_bytes=spec.max_exchange_bytes,
                epoch=mesh.epoch,
                deadline_s=spec.step_deadline_s,
                spin_s=mesh.spin_s,
            )
        self._thread = threading.Thread(
            target=self._serve, args=(mesh.cores,), name="steps", daemon=True
        )
        self._thread.start()

    def exchange_stats(self) -> dict[str, Any]:
        """Counters and latest waits of this rank's exchange (`ExchangeStats.snapshot`)."""
        assert self._exchange is not None, "joined the mesh"
        return self._exchange.stats.snapshot()

    def close(self) -> None:
        """Leave the mesh and end the serving thread. Idempotent."""
        for closable in (self._listener, self._link, self._exchange):
            if closable is not None:
                closable.close()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _count_stage(self) -> None:
        self._stages_loaded += 1

    def _serve(self, cores: tuple[int, ...]) -> None:
        assert self._program is not None, "loaded"
        assert self._link is not None, "joined"
        assert self._exchange is not None, "joined"
        if cores:
            os.sched_setaffinity(0, cores)  # of this thread and those it starts
        torch.set_num_threads(self._spec.threads if self._spec else 1)
        try:
            serve_steps(self._program, self._link, self._exchange)
        except PeerLost as error:
            if error.peer != COORDINATOR:
                logger.error("rank %d stops: %s", self.rank, error)
        except Exception:
            logger.exception("rank %d stops", self.rank)
        finally:
            # Closed sockets are how peers and the coordinator learn of it.
            self._link.close()
            self._exchange.close()
