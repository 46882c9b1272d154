"""The exchange over torch.distributed: NCCL between GPUs, or gloo.

With NCCL a gather only enqueues work on the current stream: it never waits for the device, so a
CUDA graph can capture it. Frames, steps and shapes are not checked, and peers do not authenticate:
torch.distributed has no secret, so it belongs on a network that only the ranks can reach.
This module knows rounds and ranks; it knows nothing of layers.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cqil_dist.assignment import Round
from cqil_dist.errors import ExchangeError
from cqil_dist.exchange.base import ExchangeStats

# Its name since torch 2.13; the earlier one is deprecated there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TorchDistributedExchange:
    """One rank's end of a torch.distributed process group, the only one of its process.

    `stats` count payload bytes, and the waits in its ring are the host's time in `gather`: with
    gloo the exchange itself, with NCCL only the time to enqueue it. Rounds that a replayed CUDA
    graph performs are not counted.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        backend: Literal["nccl", "gloo"],
        init_address: str,
        dtype: torch.dtype,
        device: torch.device | str,
        deadline_s: float = 30.0,
    ) -> None:
        """Join the group; returns when all ranks have.

        Args:
            rank: this rank, 0 .. world-1.
            init_address: "host:port" of rank 0, a free port there.
            dtype: of every partial result.
            device: where partial results live: this rank's GPU for NCCL, the CPU for gloo.
            deadline_s: seconds to join, and seconds that a gather may take.

        Raises:
            ExchangeError: the group did not form, or this process already has one.
        """
        self.rank = rank
        self.stats = ExchangeStats()
        self._world = world
        self._backend = backend
        self._dtype = dtype
        self._device = torch.device(device)
        self._step = 0
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._open = True
        self._closing = threading.Lock()
        try:
            dist.init_process_group(
                backend,
                init_method=f"tcp://{init_address}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=deadline_s),
                # Connects NCCL now rather than in the first round, where not all ranks take part.
                device_id=self._device if backend == "nccl" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise ExchangeError(
                f"rank {rank} of {world} could not join the {backend} group at {init_address}: "
                f"{error}"
            ) from error

    def begin_step(self, step: int) -> None:
        """See `Exchange.begin_step`."""
        self._step = step
        self.stats.steps += 1

    def gather(
        self, round: Round, own: Tensor | None, shapes: Mapping[int, tuple[int, ...]]
    ) -> list[tuple[int, Tensor]]:
        """See `Exchange.gather`. A lost peer raises ExchangeError: the backends do not name it.

        Over gloo a rank that only sends waits until its receivers take part.
        """
        started = time.perf_counter()
        if not self._open:
            raise ExchangeError(f"rank {self.rank} has closed its exchange")
        contributes = any(self.rank in wanted for wanted in round.sources)
        if contributes and own is None:
            raise ExchangeError(
                f"rank {self.rank} contributes to round {round.index} but passed no partial result"
            )
        try:
            if own is not None and self._is_all_to_all(round, shapes):
                parts = self._all_gather(own)
            else:
                parts = self._send_and_receive(round, own, shapes)
        except RuntimeError as error:
            raise ExchangeError(
                f"step {self._step}, round {round.index} failed in {self._backend}: {error}"
            ) from error
        self._count(round, own, parts, contributes, time.perf_counter() - started)
        return parts

    def close(self) -> None:
        """Leave the group. Idempotent. A gather in another thread ends no sooner than it would."""
        with self._closing:
            if self._open:
                self._open = False
                dist.destroy_process_group()

    def _is_all_to_all(self, round: Round, shapes: Mapping[int, tuple[int, ...]]) -> bool:
        """Whether every rank needs every rank's part, and all parts have one shape."""
        everyone = tuple(range(self._world))
        return (
            all(wanted == everyone for wanted in round.sources) and len(set(shapes.values())) == 1
        )

    def _all_gather(self, own: Tensor) -> list[tuple[int, Tensor]]:
        gathered = self._buffer(-1, (self._world, *own.shape))
        _all_gather_single(gathered.view(-1), own.view(-1))
        return [(r, own if r == self.rank else gathered[r]) for r in range(self._world)]

    def _send_and_receive(
        self, round: Round, own: Tensor | None, shapes: Mapping[int, tuple[int, ...]]
    ) -> list[tuple[int, Tensor]]:
        parts: list[tuple[int, Tensor]] = []
        operations: list[dist.P2POp] = []
        for target in round.targets(self.rank):
            assert own is not None
            operations.append(dist.P2POp(dist.isend, own, target))
        for source in round.sources[self.rank]:
            if source == self.rank:
                assert own is not None
                parts.append((source, own))
            else:
                buffer = self._buffer(source, shapes[source])
                operations.append(dist.P2POp(dist.irecv, buffer, source))
                parts.append((source, buffer))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()  # NCCL: the stream waits, not the host
        return parts

    def _buffer(self, source: int, shape: tuple[int, ...]) -> Tensor:
        """The receive buffer of this shape for `source` (-1: for all ranks in one).

        One for each power of two, never released: a captured CUDA graph keeps writing to the
        addresses it was captured with.
        """
        needed = math.prod(shape)
        size = 1 << max(0, needed - 1).bit_length()
        if (source, size) not in self._buffers:
            with torch.inference_mode(False):  # else it were of no use outside of it
                buffer = torch.empty(size, dtype=self._dtype, device=self._device)
            self._buffers[source, size] = buffer
        return self._buffers[source, size][:needed].view(shape)

    def _count(
        self,
        round: Round,
        own: Tensor | None,
        parts: list[tuple[int, Tensor]],
        contributes: bool,
        wait_s: float,
    ) -> None:
        received = [part for source, part in parts if source != self.rank]
        self.stats.rounds += bool(contributes or received)
        self.stats.rounds_led += round.leader == self.rank
        if own is not None:
            self.stats.bytes_sent += own.nbytes * len(round.targets(self.rank))
        self.stats.bytes_received += sum(part.nbytes for part in received)
        if received:
            self.stats.record_wait(self._step, round.index, wait_s)
