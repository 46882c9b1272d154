"""The exchange over TCP: every rank connected to every other, one frame per peer per round.

A receiver knows what frame comes next, so it reads head and payload in one call and compares the
head with the one it would have sent itself. The usual round is thus one system call per peer to
send and one to receive. What those leave over is finished in one loop over all peers, so that
ranks which send each other megabytes at the same time make room for each other.

A frame's header is [epoch, step, round index, dtype code, *shape]. This module knows rounds and
ranks; it knows nothing of layers, and it does no arithmetic.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cqil_dist.assignment import Round
from cqil_dist.errors import CqilError, ExchangeError, PeerLost, ProtocolError
from cqil_dist.exchange import framing
from cqil_dist.exchange.base import ExchangeStats
from cqil_dist.exchange.sockets import prepare, unsent, wait_ready

DEFAULT_SPIN_S = 0.001

# Space for the head in front of a buffer's payload: 8 bytes of lengths, then a list of 4 numbers
# and MAX_DIMS sizes of at most 9 bytes each. A multiple of 64, which keeps the payload aligned.
_HEAD_ROOM = 128


class TcpExchange:
    """One rank's end of a full mesh of authenticated connections. No peers is a world of one."""

    def __init__(
        self,
        rank: int,
        peers: Mapping[int, socket.socket],
        addresses: Mapping[int, str],
        dtype: torch.dtype,
        device: torch.device | str,
        max_bytes: int,
        *,
        epoch: int = 0,
        deadline_s: float = 30.0,
        spin_s: float = DEFAULT_SPIN_S,
    ) -> None:
        """Take over the connections of one epoch's mesh.

        Args:
            rank: this rank.
            peers: a connection to each other rank; closed by `close`.
            addresses: "host:port" of each other rank, for messages.
            dtype: of every partial result.
            device: where partial results live. Those not on the CPU are staged through host
                memory, page-locked for CUDA.
            max_bytes: bound on one partial result, hence on the receive buffer of each peer.
            epoch: of the mesh; a frame of another epoch is refused.
            deadline_s: seconds that a gather may take.
            spin_s: seconds that a gather polls before it sleeps. A core that sleeps takes tens of
                microseconds to wake; one that polls uses power, and yields to whoever needs it.
        """
        self.rank = rank
        self.stats = ExchangeStats()
        self._device = torch.device(device)
        self._on_host = self._device.type == "cpu"
        self._dtype = dtype
        self._dtype_code = framing.dtype_code(dtype)
        self._max_bytes = max_bytes
        self._epoch = epoch
        self._deadline_s = deadline_s
        self._spin_s = min(spin_s, deadline_s)
        self._step = 0
        pinned = self._device.type == "cuda"
        self._peers = {
            peer: _Peer(peer, sock, addresses[peer], _Buffer(dtype, max_bytes, pinned))
            for peer, sock in peers.items()
        }
        self._staging = _Buffer(dtype, max_bytes, pinned)
        self._routes: dict[Round, _Route] = {}
        self._failure: BaseException | None = None
        self._closed = False
        # Held by a gather, so that no descriptor is closed and given to another file meanwhile.
        self._in_use = threading.Lock()

    def begin_step(self, step: int) -> None:
        """See `Exchange.begin_step`."""
        self._step = step
        self.stats.steps += 1

    def gather(
        self, round: Round, own: Tensor | None, shapes: Mapping[int, tuple[int, ...]]
    ) -> list[tuple[int, Tensor]]:
        """See `Exchange.gather`. After an error, no further round is possible."""
        started = time.monotonic()
        with self._in_use:
            self._check_usable()
            try:
                route = self._routes.get(round) or self._add_route(round)
                self._transfer(route, own, shapes, started)
            except BaseException as error:
                # A frame may be half sent or half read: nothing can follow it.
                self._failure = error
                if self._closed and isinstance(error, CqilError):
                    self._check_usable()
                raise
        if route.senders:
            self.stats.record_wait(self._step, round.index, time.monotonic() - started)
        return [(source, self._part(source, own)) for source in round.sources[self.rank]]

    def close(self) -> None:
        """See `Exchange.close`."""
        self._closed = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # not connected any more
                peer.sock.shutdown(socket.SHUT_RDWR)
        with self._in_use:
            for peer in self._peers.values():
                peer.sock.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise ExchangeError(f"rank {self.rank} has closed its exchange of epoch {self._epoch}")
        if self._failure is not None:
            raise ExchangeError(
                f"the exchange of epoch {self._epoch} has failed and cannot go on; connect a new "
                f"epoch. It failed with: {self._failure}"
            ) from self._failure

    def _add_route(self, round: Round) -> _Route:
        route = self._routes[round] = _Route(
            receivers=[self._peers[target] for target in round.targets(self.rank)],
            senders=[self._peers[r] for r in round.sources[self.rank] if r != self.rank],
            contributes=any(self.rank in wanted for wanted in round.sources),
            leads=round.leader == self.rank,
            index=round.index,
        )
        return route

    def _transfer(
        self,
        route: _Route,
        own: Tensor | None,
        shapes: Mapping[int, tuple[int, ...]],
        started: float,
    ) -> None:
        """Do one round: on return all is sent, and each sender's part is in its buffer."""
        sent = received = 0
        writing: list[_Peer] = []
        reading: list[_Peer] = []
        shape: tuple[int, ...] | None = None
        head = b""
        if route.contributes:
            own = self._check_own(route, own)
            shape = own.shape
            head = self._head(route.index, shape)
        if route.receivers:
            assert own is not None
            frame: list[bytes | memoryview] = [head, self._host_memory(own)]
            frame_bytes = sum(map(len, frame))
            for peer in route.receivers:
                sent += frame_bytes
                if not peer.send(frame, frame_bytes):
                    writing.append(peer)
        for peer in route.senders:
            if shape != shapes[peer.rank]:  # seldom: all partial results have one shape
                shape = shapes[peer.rank]
                head = self._head(route.index, shape)
            received += peer.expect(head, shape)
            if not peer.try_receive():
                reading.append(peer)
        if writing or reading:
            self._finish(writing, reading, route.index, started)
        self.stats.rounds += bool(route.contributes or route.senders)
        self.stats.rounds_led += route.leads
        self.stats.bytes_sent += sent
        self.stats.bytes_received += received

    def _finish(
        self, writing: list[_Peer], reading: list[_Peer], index: int, started: float
    ) -> None:
        """Send and receive what is left, all peers at once: spin, then sleep until one is ready."""
        spin_until, deadline = started + self._spin_s, started + self._deadline_s
        while True:
            writing = [peer for peer in writing if not peer.try_send()]
            reading = [peer for peer in reading if not peer.try_receive()]
            if not (writing or reading):
                return
            if time.monotonic() < spin_until:
                os.sched_yield()  # on a shared core, to the very rank this one waits for
                continue
            events = {peer.sock: select.POLLIN for peer in reading}
            for peer in writing:
                events[peer.sock] = events.get(peer.sock, 0) | select.POLLOUT
            if not wait_ready(events, deadline):
                missing = [peer.rank for peer in reading]
                stuck = [peer.rank for peer in writing]
                raise (reading or writing)[0].lost(
                    f"step {self._step}, round {index} was not done within {self._deadline_s:g} s "
                    f"(nothing from ranks {missing}; ranks {stuck} take nothing)"
                )

    def _part(self, source: int, own: Tensor | None) -> Tensor:
        if source == self.rank:
            assert own is not None
            return own
        received = self._peers[source].buffer.tensor
        return received if self._on_host else received.to(self._device)

    def _head(self, index: int, shape: tuple[int, ...]) -> bytes:
        """What precedes a payload of this shape in this round, on any connection."""
        header = [self._epoch, self._step, index, self._dtype_code, *shape]
        return framing.encode_head(
            header, framing.tensor_bytes(self._dtype, shape), self._max_bytes
        )

    def _check_own(self, route: _Route, own: Tensor | None) -> Tensor:
        if own is None:
            raise ExchangeError(
                f"rank {self.rank} contributes to round {route.index} but passed no partial result"
            )
        if own.dtype is not self._dtype or not own.is_contiguous():
            raise ExchangeError(
                f"rank {self.rank} passed a partial result of {own.dtype}, strides {own.stride()} "
                f"for shape {tuple(own.shape)}; pass a contiguous one of {self._dtype}"
            )
        return own

    def _host_memory(self, own: Tensor) -> memoryview:
        if self._on_host:
            return framing.memory_of(own)
        self._staging.reserve(own.shape)
        self._staging.tensor.copy_(own)
        return self._staging.memory[_HEAD_ROOM:]


@dataclass(frozen=True, slots=True)
class _Route:
    """One round as one rank sees it."""

    index: int
    receivers: Sequence[_Peer]
    senders: Sequence[_Peer]
    contributes: bool
    leads: bool


class _Buffer:
    """Host memory for one frame, reused and grown on demand.

    `tensor` is the payload in the shape last reserved, and `memory` its bytes with _HEAD_ROOM in
    front.
    """

    def __init__(self, dtype: torch.dtype, max_bytes: int, pinned: bool) -> None:
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self.reserve((0,))

    def reserve(self, shape: tuple[int, ...]) -> None:
        """Make room for a payload of this shape, which is within the bound."""
        end = _HEAD_ROOM + framing.tensor_bytes(self._dtype, shape)
        if end > self._bytes.numel():
            size = max(end, min(2 * self._bytes.numel(), _HEAD_ROOM + self._max_bytes))
            with torch.inference_mode(False):  # else the buffer were of no use outside of it
                self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        self.tensor = self._bytes[_HEAD_ROOM:end].view(self._dtype).view(shape)
        self.memory = framing.memory_of(self._bytes[:end])


class _Peer:
    """The connection to one other rank, and how far the present round's frames have come."""

    def __init__(self, rank: int, sock: socket.socket, address: str, buffer: _Buffer) -> None:
        prepare(sock)
        self.rank = rank
        self.sock = sock
        self.address = address
        self.buffer = buffer
        self._unsent: Sequence[bytes | memoryview] = ()
        self._unsent_bytes = 0
        self._head = b""
        self._shape: tuple[int, ...] | None = None
        self._frame = memoryview(b"")
        self._received = 0

    def send(self, frame: Sequence[bytes | memoryview], frame_bytes: int) -> bool:
        """Begin to send a frame; whether all of it went. If not, `try_send` goes on."""
        self._unsent = frame
        self._unsent_bytes = frame_bytes
        return self.try_send()

    def expect(self, head: bytes, shape: tuple[int, ...]) -> int:
        """Make room for the frame that `try_receive` is to receive. Returns its bytes."""
        if shape != self._shape:
            self.buffer.reserve(shape)
            self._shape = shape
        assert len(head) <= _HEAD_ROOM, f"{len(head)} bytes of head for shape {shape}"
        self._head = head
        self._frame = self.buffer.memory[_HEAD_ROOM - len(head) :]
        self._received = 0
        return self._frame.nbytes

    def try_send(self) -> bool:
        """Send what the kernel takes now; whether that was the last of the frame."""
        try:
            sent = self.sock.sendmsg(self._unsent)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self.lost(f"sending failed: {error}") from error
        self._unsent_bytes -= sent
        if self._unsent_bytes:
            self._unsent = unsent(self._unsent, sent)
        return not self._unsent_bytes

    def try_receive(self) -> bool:
        """Receive what has come of the frame, never more; whether that was the last of it."""
        frame, before = self._frame, self._received
        try:
            received = self.sock.recv_into(frame[before:] if before else frame)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self.lost(f"receiving failed: {error}") from error
        if not received:
            raise self.lost("it closed the connection")
        self._received = before + received
        if before < len(self._head):
            self._check_head()
        return self._received == frame.nbytes

    def lost(self, reason: str) -> PeerLost:
        return PeerLost(self.rank, self.address, reason)

    def _check_head(self) -> None:
        """Compare what has come of the head with the one we would have sent."""
        come = min(self._received, len(self._head))
        if self._frame[:come] != self._head[:come]:
            sent = _describe(self._frame[: self._received])
            raise ProtocolError(
                f"rank {self.rank} at {self.address} sent {sent} where {_describe(self._head)} "
                "comes next; all ranks must walk the same rounds of the same plan"
            )


def _describe(frame: bytes | memoryview) -> str:
    """What the head of a frame says, for messages."""
    try:
        header_bytes, _ = framing.decode_prefix(frame)
        header = frame[framing.PREFIX.size : framing.PREFIX.size + header_bytes]
        epoch, step, index, code, *shape = framing.decode_header(header)
        dtype = framing.dtype_from_code(code)
    except (ProtocolError, ValueError, TypeError):
        return f"bytes that are no frame ({bytes(frame[:32]).hex(' ')})"
    return f"epoch {epoch}, step {step}, round {index}, {dtype} of shape {tuple(shape)}"
