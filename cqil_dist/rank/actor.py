"""The Ray actor around one rank: reads its weights, joins the mesh, serves steps on a thread.

Ray places it, starts it again when its process dies, and asks it questions. Tokens do not pass
through Ray: steps come over the coordinator's link, and partial results over the exchange.

An actor is no particular rank until it joins a mesh as one. Meshes follow each other in epochs:
when a rank is lost, those that are left keep their weights and connect again in the next.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from contextlib import ExitStack
from typing import Any

import ray
import torch

from cqil_dist.errors import ExchangeError, PeerLost
from cqil_dist.exchange.base import Exchange
from cqil_dist.exchange.handshake import COORDINATOR
from cqil_dist.exchange.link import Link
from cqil_dist.exchange.listener import Listener, connect_mesh
from cqil_dist.exchange.sockets import format_address
from cqil_dist.exchange.tcp import TcpExchange
from cqil_dist.exchange.torch_distributed import TorchDistributedExchange
from cqil_dist.model.footprint import footprint
from cqil_dist.rank.memory import (
    available_bytes,
    freed_memory_returned,
    release_import_time_code,
)
from cqil_dist.rank.mesh_spec import ActorState, MeshSpec
from cqil_dist.rank.metrics import RankMetrics
from cqil_dist.rank.model_files import checkpoints_of, model_directory
from cqil_dist.rank.program import RankProgram
from cqil_dist.rank.protocol import serve_steps
from cqil_dist.rank.spec import EngineSpec

logger = logging.getLogger(__name__)

QUESTIONS = "questions"
"""Concurrency group of what must be answered while all other calls wait."""

# Beyond the deadline of the step that it may be in the midst of.
_THREAD_END_S = 5.0
# A spare leaves this much more than it takes to those that serve.
_HEADROOM = 2.0


class LayerActor:
    """An actor that holds one rank, which is not a layer, or that is a spare for any of them.

    A rank may hold many layers, or shares of them. The methods are called through Ray, from several
    threads.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._loading = threading.Lock()
        self._stages_loaded = 0
        self._wanted = threading.Event()
        self._told_of_memory = False
        self._programs: dict[int, RankProgram] = {}
        self._mesh_lock = threading.Lock()
        self._epoch = -1
        self._listener: Listener | None = None
        self._mesh: _Mesh | None = None

    @ray.method(concurrency_group=QUESTIONS)
    def state(self) -> ActorState:
        """Say at once what the actor is, whatever else it is doing."""
        gpus = ray.get_gpu_ids()
        return ActorState(
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            cores=tuple(sorted(os.sched_getaffinity(0))),
            gpu=str(gpus[0]) if gpus else None,
            epoch=self._epoch,
            ranks=frozenset(self._programs),
        )

    def load(self, spec: EngineSpec, rank: int) -> None:
        """Read a rank's weights, unless they are here already.

        Raises:
            ModelNotFound: this node does not have the model, and cannot fetch it.
            CheckpointError: the weights are missing or damaged; the message says which.
        """
        self._wanted.set()  # `prepare` ends before its next rank
        with self._loading:
            self._read(spec, rank)

    def prepare(self, spec: EngineSpec) -> None:
        """Read the weights of all ranks beforehand, as far as memory allows. Idempotent.

        Spares do: whichever rank is lost, they have its weights. A call of `load` comes first.
        """
        self._wanted.clear()
        for rank in range(spec.world):
            with self._loading:
                if self._wanted.is_set():
                    return
                if rank in self._programs:
                    continue
                share = footprint(
                    spec.assignments,
                    rank,
                    spec.config,
                    spec.precision,
                    adapted=spec.adapter is not None,
                )
                needed = int(_HEADROOM * share.total(spec.engine.cache_tokens))
                free = available_bytes(self._device)
                if free < needed:
                    if not self._told_of_memory:
                        logger.warning(
                            "spare does not read rank %d beforehand: %d MB are free, %d MB wanted",
                            rank,
                            free >> 20,
                            needed >> 20,
                        )
                    self._told_of_memory = True
                    return
                self._read(spec, rank)

    def _read(self, spec: EngineSpec, rank: int) -> None:
        if rank in self._programs:
            return
        path = model_directory(spec.model, spec.model_path)
        torch.set_num_threads(spec.threads)
        release_import_time_code()
        with freed_memory_returned():
            self._programs[rank] = RankProgram(
                rank,
                spec.assignments,
                spec.config,
                checkpoints_of(spec, path),
                spec.cache_shape,
                spec.precision,
                self._device,
                on_stage_loaded=self._count_stage,
            )

    @ray.method(concurrency_group=QUESTIONS)
    def stages_loaded(self) -> int:
        """Count the stages whose weights this process has read so far."""
        return self._stages_loaded

    def listen(self, host: str, secret: bytes, epoch: int) -> str:
        """Leave the mesh of an earlier epoch and open a port on `host` for this one's.

        Args:
            host: this node's address in the cluster.

        Returns:
            The listener's "host:port".

        Raises:
            ExchangeError: the actor has been called to a later epoch.
            OSError: no port can be had.
        """
        with self._mesh_lock:
            if epoch <= self._epoch:
                raise ExchangeError(
                    f"called to epoch {epoch}, but this actor has been called to {self._epoch}"
                )
            self._epoch = epoch
            self._leave()
            self._listener = Listener(host, secret, epoch)
            return self._listener.address

    def free_address(self, host: str) -> str:
        """Find a free "host:port" on this rank's node, for NCCL's rendezvous."""
        with socket.socket() as sock:
            sock.bind((host, 0))
            return format_address(sock.getsockname())

    def join(self, spec: EngineSpec, mesh: MeshSpec) -> dict[str, int]:
        """Connect to every peer and the coordinator, and start serving steps as `mesh.rank`.

        Weights of other ranks are dropped.

        Returns:
            "weight_bytes" and "kv_bytes" of the rank.

        Raises:
            ExchangeError: a peer or the coordinator did not connect in time, or the actor has been
                called to another epoch meanwhile.
        """
        listener = self._listener
        if listener is None or mesh.epoch != self._epoch:
            raise ExchangeError(f"called to join epoch {mesh.epoch}, but this is {self._epoch}")
        if (program := self._programs.get(mesh.rank)) is None:
            raise ExchangeError(f"called to be rank {mesh.rank}, whose weights are not here")
        joined = _Mesh(program, spec, mesh, listener, self._device)
        with self._mesh_lock:
            if mesh.epoch != self._epoch:
                joined.close()
                raise ExchangeError(f"epoch {mesh.epoch} was given up for {self._epoch}")
            self._mesh = joined
            self._programs = {mesh.rank: program}
            joined.start()
        return {"weight_bytes": program.weight_bytes, "kv_bytes": program.kv_bytes}

    def exchange_stats(self) -> dict[str, Any]:
        """Return counters and latest waits of this rank's exchange (`ExchangeStats.snapshot`)."""
        assert self._mesh is not None, "joined the mesh"
        return self._mesh.exchange.stats.snapshot()

    def close(self) -> None:
        """Leave the mesh and end the serving thread. Idempotent."""
        with self._mesh_lock:
            self._leave()

    def _leave(self) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._mesh is not None:
            self._mesh.close()
        self._listener = self._mesh = None

    def _count_stage(self) -> None:
        self._stages_loaded += 1


class _Mesh:
    """The connections of one rank in one epoch, and the thread that serves steps over them."""

    def __init__(
        self,
        program: RankProgram,
        spec: EngineSpec,
        mesh: MeshSpec,
        listener: Listener,
        device: torch.device,
    ) -> None:
        self._program = program
        self._threads = spec.threads
        self._end_s = spec.engine.step_deadline_s + _THREAD_END_S
        self._cores = mesh.cores
        self._metrics = RankMetrics(program.clock, mesh.rank, spec.names)
        with listener, ExitStack() as on_failure:
            sockets = connect_mesh(
                listener,
                mesh.rank,
                mesh.addresses,
                mesh.secret,
                mesh.epoch,
                mesh.deadline_s,
                extra={COORDINATOR},
            )
            for sock in sockets.values():
                on_failure.enter_context(sock)
            coordinator = sockets.pop(COORDINATOR)
            address = format_address(coordinator.getpeername())
            self._link = Link(
                coordinator,
                COORDINATOR,
                address,
                spec.max_message_bytes,
                spec.engine.step_deadline_s,
            )
            self.exchange = _exchange(spec, mesh, sockets, device)
            on_failure.pop_all()
        self._thread = threading.Thread(target=self._serve, name="steps", daemon=True)

    def start(self) -> None:
        self._metrics.start()
        self._thread.start()

    def close(self) -> None:
        """Close the connections and wait for the thread.

        A thread that does not end, hung in a device or a library, would use the cache beside the
        next one: the process ends instead, and Ray starts another. Closing NCCL can hang as well.
        """
        guard = threading.Timer(self._end_s, self._end_process)
        guard.daemon = True
        guard.start()
        try:
            self._metrics.stop()
            self._link.close()
            self.exchange.close()
            if self._thread.is_alive():
                self._thread.join()
        finally:
            guard.cancel()

    def _end_process(self) -> None:
        logger.error("a step did not end within %g s; ending the process", self._end_s)
        os._exit(1)

    def _serve(self) -> None:
        if self._cores:
            os.sched_setaffinity(0, self._cores)  # of this thread and those it starts
        torch.set_num_threads(self._threads)
        try:
            serve_steps(self._program, self._link, self.exchange)
        except PeerLost as error:
            if error.peer != COORDINATOR:
                logger.error("rank %d leaves the mesh: %s", self._program.rank, error)
        except Exception:
            logger.exception("rank %d leaves the mesh", self._program.rank)
        finally:
            # Closed sockets tell peers and the coordinator of it.
            self._link.close()
            self.exchange.close()


def _exchange(
    spec: EngineSpec, mesh: MeshSpec, sockets: dict[int, socket.socket], device: torch.device
) -> Exchange:
    if mesh.nccl_address is None:
        return TcpExchange(
            mesh.rank,
            sockets,
            mesh.addresses,
            spec.config.hidden_size,
            spec.precision.wire_dtype,
            device,
            max_bytes=spec.max_exchange_bytes,
            epoch=mesh.epoch,
            deadline_s=spec.engine.step_deadline_s,
            spin_s=mesh.spin_s,
        )
    for sock in sockets.values():
        sock.close()
    return TorchDistributedExchange(
        mesh.rank,
        spec.world,
        "nccl",
        mesh.nccl_address,
        spec.config.hidden_size,
        spec.precision.wire_dtype,
        device,
        spec.engine.step_deadline_s,
    )
