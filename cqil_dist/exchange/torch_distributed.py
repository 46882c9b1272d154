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
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cqil_dist.assignment import Round
from cqil_dist.errors import ExchangeError
from cqil_dist.exchange.base import Exchange, ExchangeStats, Shape, unfit

# Its name since torch 2.13; the earlier one is deprecated there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TorchDistributedExchange(Exchange):
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
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        deadline_s: float = 30.0,
    ) -> None:
        """Join the group, and return when all ranks have.

        Args:
            rank: this rank, 0 .. world-1.
            init_address: "host:port" of rank 0, a free port there.
            width: of every partial result: the model's.
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
        self._width = width
        self._dtype = dtype
        self._device = torch.device(device)
        self._step = self._tokens = 0
        self._buffers: dict[int, Tensor] = {}
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

    def begin_step(self, step: int, tokens: int) -> None:
        """See `Exchange.begin_step`."""
        self._step = step
        self._tokens = tokens
        self.stats.steps += 1

    def gather(self, exchange_round: Round | None, own_CND: Tensor | None) -> Tensor | None:
        """See `Exchange.gather`. A lost peer raises ExchangeError: the backends do not name it.

        Over gloo a rank that only sends waits until its receivers take part.
        """
        if exchange_round is None:
            return own_CND
        started = time.perf_counter()
        if not self._open:
            raise ExchangeError(f"rank {self.rank} has closed its exchange")
        own_shape = self._shape(exchange_round, self.rank)
        own = torch.empty(0, *own_shape[1:])  # of a rank that nobody asks
        if exchange_round.targets(self.rank) or self.rank in exchange_round.sources[self.rank]:
            if own_CND is None or own_CND.numel() != math.prod(own_shape):
                raise unfit(self.rank, exchange_round, own_CND, own_shape, self._dtype)
            own = own_CND.view(own_shape)
        gathered_CND: Tensor | None
        try:
            if self._is_all_to_all(exchange_round):
                gathered_CND = self._all_gather(own)
            else:
                gathered_CND = self._send_and_receive(exchange_round, own)
        except RuntimeError as error:
            raise ExchangeError(
                f"step {self._step}, round {exchange_round.index} failed in {self._backend}: "
                f"{error}"
            ) from error
        self._count(exchange_round, time.perf_counter() - started)
        return gathered_CND

    def close(self) -> None:
        """Leave the group. Idempotent. A gather in another thread ends no sooner than it would."""
        with self._closing:
            if self._open:
                self._open = False
                dist.destroy_process_group()

    def _shape(self, exchange_round: Round, source: int) -> Shape:
        return exchange_round.tensor_counts[source], self._tokens, self._width

    def _is_all_to_all(self, exchange_round: Round) -> bool:
        """Return whether every rank needs every rank's part, and all parts have one shape."""
        everyone = tuple(range(self._world))
        same_shape = len(set(exchange_round.tensor_counts)) == 1
        return same_shape and all(wanted == everyone for wanted in exchange_round.sources)

    def _all_gather(self, own_CND: Tensor) -> Tensor:
        tensors, tokens, width = own_CND.shape
        gathered_CND = self._buffer((self._world * tensors, tokens, width))
        _all_gather_single(gathered_CND.view(-1), own_CND.view(-1))
        return gathered_CND

    def _send_and_receive(self, exchange_round: Round, own_CND: Tensor) -> Tensor | None:
        wanted = exchange_round.sources[self.rank]
        total = sum(exchange_round.tensor_counts[source] for source in wanted)
        gathered_CND = self._buffer((total, self._tokens, self._width))
        operations = [
            dist.P2POp(dist.isend, own_CND, target) for target in exchange_round.targets(self.rank)
        ]
        first = 0
        for source in wanted:
            part_CND = gathered_CND[first : first + exchange_round.tensor_counts[source]]
            first += exchange_round.tensor_counts[source]
            if source == self.rank:
                part_CND.copy_(own_CND)
            else:
                operations.append(dist.P2POp(dist.irecv, part_CND, source))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()  # NCCL: the stream waits, not the host
        return gathered_CND if wanted else None

    def _buffer(self, shape: Shape) -> Tensor:
        """Return memory for gathered tensors, valid until the next gather.

        There is one for each power of two, never released: a captured CUDA graph keeps writing to
        the addresses it was captured with.
        """
        needed = math.prod(shape)
        size = 1 << max(0, needed - 1).bit_length()
        if size not in self._buffers:
            with torch.inference_mode(False):  # else it were of no use outside of it
                self._buffers[size] = torch.empty(size, dtype=self._dtype, device=self._device)
        return self._buffers[size][:needed].view(shape)

    def _count(self, exchange_round: Round, wait_s: float) -> None:
        received = [source for source in exchange_round.sources[self.rank] if source != self.rank]
        targets = exchange_round.targets(self.rank)
        contributes = bool(targets) or self.rank in exchange_round.sources[self.rank]
        self.stats.rounds += bool(contributes or received)
        self.stats.rounds_led += exchange_round.leader == self.rank
        self.stats.bytes_sent += self._bytes(exchange_round, self.rank) * len(targets)
        self.stats.bytes_received += sum(self._bytes(exchange_round, r) for r in received)
        if received:
            self.stats.record_wait(self._step, exchange_round.index, wait_s)

    def _bytes(self, exchange_round: Round, source: int) -> int:
        return math.prod(self._shape(exchange_round, source)) * self._dtype.itemsize
