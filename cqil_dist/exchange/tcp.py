"""The exchange over TCP: every rank connected to every other, one frame per peer per round.

A receiver knows what frame comes next, so it reads head and payload in one call, the payload
straight to its place among those of other ranks, and compares the head with the one it would have
sent itself. The usual round is thus one system call per peer to send and one to receive. What
those leave over is finished in one loop over all peers, so that ranks which send each other
megabytes at the same time make room for each other.

A frame's header is [epoch, step, round index, dtype code, *shape]. This module knows rounds and
ranks; it knows nothing of layers, and it does no arithmetic.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cqil_dist.assignment import Round
from cqil_dist.errors import CqilError, ExchangeError, PeerLost, ProtocolError
from cqil_dist.exchange import framing
from cqil_dist.exchange.base import Exchange, ExchangeStats, unfit
from cqil_dist.exchange.sockets import prepare, unsent, wait_ready

DEFAULT_SPIN_S = 0.001

# Layouts of the gather buffer that are kept, some 2 kB each for every peer.
_KEPT_LAYOUTS = 256

# Room for the head of a frame: 8 bytes of lengths, then a list of 4 numbers and 3 sizes of at most
# 9 bytes each.
_HEAD_ROOM = 128


class TcpExchange(Exchange):
    """One rank's end of a full mesh of authenticated connections; a world of one has none."""

    def __init__(
        self,
        rank: int,
        peers: Mapping[int, socket.socket],
        addresses: Mapping[int, str],
        width: int,
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
            width: of every partial result: the model's.
            dtype: of every partial result.
            device: where partial results live. Those not on the CPU are staged through host
                memory, page-locked for CUDA.
            max_bytes: bound on what one rank contributes to a round.
            epoch: of the mesh; a frame of another epoch is refused.
            deadline_s: seconds that a gather may take.
            spin_s: seconds that a gather polls before it sleeps. A core that sleeps takes tens of
                microseconds to wake; one that polls uses power, and yields to whoever needs it.
        """
        self.rank = rank
        self.stats = ExchangeStats()
        self._device = torch.device(device)
        self._on_host = self._device.type == "cpu"
        self._width = width
        self._dtype = dtype
        self._dtype_code = framing.dtype_code(dtype)
        self._max_bytes = max_bytes
        self._epoch = epoch
        self._deadline_s = deadline_s
        self._spin_s = min(spin_s, deadline_s)
        self._step = self._tokens = self._tensor_bytes = 0
        pinned = self._device.type == "cuda"
        self._peers = {peer: _Peer(peer, sock, addresses[peer]) for peer, sock in peers.items()}
        self._gathered = _Buffer(dtype, pinned)
        self._staging = _Buffer(dtype, pinned)
        self._routes: dict[Round, _Route] = {}
        # By what is wanted of whom, and the step's number of tokens: rounds have few that differ.
        self._layouts: dict[tuple[tuple[tuple[int, int], ...], int], _Layout] = {}
        self._failure: BaseException | None = None
        self._closed = False
        # Held by a gather, so that no descriptor is closed and given to another file meanwhile.
        self._in_use = threading.Lock()

    def begin_step(self, step: int, tokens: int) -> None:
        """See `Exchange.begin_step`."""
        self._step = step
        self._tokens = tokens
        self._tensor_bytes = tokens * self._width * self._dtype.itemsize
        self.stats.steps += 1

    def gather(self, exchange_round: Round | None, own_CND: Tensor | None) -> Tensor | None:
        """See `Exchange.gather`. After an error, no further round is possible."""
        if exchange_round is None:
            return own_CND
        started = time.monotonic()
        with self._in_use:
            if self._closed or self._failure is not None:
                raise self._unusable()
            try:
                route = self._routes.get(exchange_round) or self._add_route(exchange_round)
                key = (route.wanted, self._tokens)
                layout = self._layouts.get(key) or self._add_layout(route)
                gathered_CND = self._transfer(route, layout, own_CND, started)
            except BaseException as error:
                # A frame may be half sent or half read: nothing can follow it.
                self._failure = error
                if self._closed and isinstance(error, CqilError):
                    raise self._unusable() from error
                raise
        if route.senders:
            self.stats.record_wait(self._step, exchange_round.index, time.monotonic() - started)
        return gathered_CND

    def close(self) -> None:
        """See `Exchange.close`."""
        self._closed = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # not connected any more
                peer.sock.shutdown(socket.SHUT_RDWR)
        with self._in_use:
            for peer in self._peers.values():
                peer.sock.close()

    def _unusable(self) -> ExchangeError:
        if self._closed:
            return ExchangeError(f"rank {self.rank} has closed its exchange of epoch {self._epoch}")
        unusable = ExchangeError(
            f"the exchange of epoch {self._epoch} has failed and cannot go on; connect a new "
            f"epoch. It failed with: {self._failure}"
        )
        unusable.__cause__ = self._failure
        return unusable

    def _add_route(self, exchange_round: Round) -> _Route:
        wanted = exchange_round.sources[self.rank]
        contributes = any(self.rank in sources for sources in exchange_round.sources)
        involved = {*wanted, self.rank} if contributes else set(wanted)
        route = self._routes[exchange_round] = _Route(
            exchange_round=exchange_round,
            receivers=[self._peers[target] for target in exchange_round.targets(self.rank)],
            senders=[self._peers[source] for source in wanted if source != self.rank],
            wanted=tuple((source, exchange_round.tensor_counts[source]) for source in wanted),
            counts={exchange_round.tensor_counts[source] for source in involved},
            contributes=contributes,
            leads=exchange_round.leader == self.rank,
        )
        return route

    def _add_layout(self, route: _Route) -> _Layout:
        total = sum(count for _, count in route.wanted) if route.senders else 0
        gathered_CND, moved = self._gathered.tensor((total, self._tokens, self._width))
        if moved or len(self._layouts) >= _KEPT_LAYOUTS:
            self._layouts.clear()  # the buffer that they lie in is given back with them
        layout = self._layouts[route.wanted, self._tokens] = _Layout(gathered_CND)
        first = 0
        for source, count in route.wanted if route.senders else ():
            part_CND = gathered_CND[first : first + count]
            first += count
            if source == self.rank:
                layout.own_CND = part_CND
            else:
                layout.payloads.append((count, framing.memory_of(part_CND)))
        return layout

    def _transfer(
        self, route: _Route, layout: _Layout, own: Tensor | None, started: float
    ) -> Tensor | None:
        """Do one round: on return all is sent, and what was wanted is in the gather buffer."""
        prefix = [self._epoch, self._step, route.exchange_round.index, self._dtype_code]
        heads = {  # by how many tensors follow
            count: framing.encode_head(
                [*prefix, count, self._tokens, self._width],
                count * self._tensor_bytes,
                self._max_bytes,
            )
            for count in route.counts
        }
        sent = received = 0
        writing: list[_Peer] = []
        reading: list[_Peer] = []
        if route.contributes:
            count = route.exchange_round.tensor_counts[self.rank]
            if (
                own is None
                or own.numel() != count * self._tokens * self._width
                or own.dtype is not self._dtype
                or not own.is_contiguous()
            ):
                shape = (count, self._tokens, self._width)
                raise unfit(self.rank, route.exchange_round, own, shape, self._dtype)
            host_own = own if self._on_host else self._staged(own, layout)
            if route.receivers:
                frame: list[bytes | memoryview] = [heads[count], framing.memory_of(host_own)]
                for peer in route.receivers:
                    peer.unsent, peer.unsent_bytes = frame, sum(map(len, frame))
                    sent += peer.unsent_bytes
                    if not peer.try_send():
                        writing.append(peer)
            if layout.own_CND is not None and self._on_host:
                layout.own_CND.copy_(own)  # while what was sent is on its way
        for peer, (count, payload) in zip(route.senders, layout.payloads, strict=True):
            received += peer.expect(heads[count], payload)
            if not peer.try_receive():
                reading.append(peer)
        if writing or reading:
            self._finish(writing, reading, route.exchange_round.index, started)
        self.stats.rounds += bool(route.contributes or route.senders)
        self.stats.rounds_led += route.leads
        self.stats.bytes_sent += sent
        self.stats.bytes_received += received
        if route.senders:
            return layout.gathered_CND if self._on_host else layout.gathered_CND.to(self._device)
        return own if route.exchange_round.sources[self.rank] else None

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

    def _staged(self, own: Tensor, layout: _Layout) -> Tensor:
        """Copy a device's tensor to host memory: to its place among what is gathered, if any."""
        place = layout.own_CND
        if place is None:
            place, _ = self._staging.tensor(tuple(own.shape))
        return place.copy_(own)


@dataclass(slots=True)
class _Layout:
    """The places in one rank's buffer of the tensors it gathers, one source after another.

    Attributes:
        gathered_CND: all of them; none where the rank has use for its own alone.
        own_CND: where its own go; None where it needs none of them.
        payloads: of each other source, in rank order, how many tensors it sends, and their bytes.
    """

    gathered_CND: Tensor
    own_CND: Tensor | None = None
    payloads: list[tuple[int, memoryview]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Route:
    """One round as one rank sees it.

    Attributes:
        receivers, senders: the peers that it sends to and receives from, in rank order.
        wanted: the ranks whose tensors it needs, itself included, and how many they contribute.
        counts: how many tensors the frames have that come and go, each number once.
    """

    exchange_round: Round
    receivers: Sequence[_Peer]
    senders: Sequence[_Peer]
    wanted: tuple[tuple[int, int], ...]
    counts: set[int]
    contributes: bool
    leads: bool


class _Buffer:
    """A piece of host memory for one tensor at a time, reused and grown on demand."""

    def __init__(self, dtype: torch.dtype, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=dtype)

    def tensor(self, shape: tuple[int, ...]) -> tuple[Tensor, bool]:
        """Return a tensor of this shape in the last one's memory, and whether that has moved."""
        needed = math.prod(shape)
        grows = needed > self._memory.numel()
        if grows:
            size = max(needed, 2 * self._memory.numel())
            with torch.inference_mode(False):  # else the buffer were of no use outside of it
                self._memory = torch.empty(size, dtype=self._memory.dtype, pin_memory=self._pinned)
        return self._memory[:needed].view(shape), grows


class _Peer:
    """The connection to one other rank, and how far the present round's frames have come.

    Attributes:
        unsent, unsent_bytes: what `try_send` is to send.
    """

    def __init__(self, rank: int, sock: socket.socket, address: str) -> None:
        prepare(sock)
        self.rank = rank
        self.sock = sock
        self.address = address
        self.unsent: Sequence[bytes | memoryview] = ()
        self.unsent_bytes = 0
        self._expected_head = b""
        self._head = memoryview(bytearray(_HEAD_ROOM))
        self._payload = memoryview(b"")
        self._received = 0

    def expect(self, head: bytes, payload: memoryview) -> int:
        """Say which frame `try_receive` is to receive, and where to. Returns its bytes."""
        assert len(head) <= _HEAD_ROOM, f"{len(head)} bytes of head"
        self._expected_head = head
        self._payload = payload
        self._received = 0
        return len(head) + payload.nbytes

    def try_send(self) -> bool:
        """Send what the kernel takes now; return whether that was the last of the frame."""
        try:
            sent = self.sock.sendmsg(self.unsent)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self.lost(f"sending failed: {error}") from error
        self.unsent_bytes -= sent
        if self.unsent_bytes:
            self.unsent = unsent(self.unsent, sent)
        return not self.unsent_bytes

    def try_receive(self) -> bool:
        """Receive what has come of the frame, never more; return whether that completes it."""
        before, head_bytes = self._received, len(self._expected_head)
        if before < head_bytes:
            room = [self._head[before:head_bytes], self._payload]
        else:
            room = [self._payload[before - head_bytes :]]
        try:
            received = self.sock.recvmsg_into(room)[0]
        except BlockingIOError:
            return False
        except OSError as error:
            raise self.lost(f"receiving failed: {error}") from error
        if not received:
            raise self.lost("it closed the connection")
        self._received = before + received
        come = min(self._received, head_bytes)
        if before < head_bytes and self._head[:come] != self._expected_head[:come]:
            raise self._wrong_head(come)
        return self._received == head_bytes + self._payload.nbytes

    def lost(self, reason: str) -> PeerLost:
        return PeerLost(self.rank, self.address, reason)

    def _wrong_head(self, come: int) -> ProtocolError:
        """Make the error for a head that we would not have sent, as its first `come` bytes show."""
        behind = self._payload[: self._received - come]
        sent = _describe(bytes(self._head[:come]) + bytes(behind[:_HEAD_ROOM]))
        return ProtocolError(
            f"rank {self.rank} at {self.address} sent {sent} where "
            f"{_describe(self._expected_head)} comes next; all ranks must walk the same rounds of "
            "the same plan"
        )


def _describe(frame: bytes) -> str:
    """Describe for messages what the head of a frame says."""
    try:
        header_bytes, _ = framing.decode_prefix(frame)
        header = frame[framing.PREFIX.size : framing.PREFIX.size + header_bytes]
        epoch, step, index, code, *shape = framing.decode_header(header)
        dtype = framing.dtype_from_code(code)
    except (ProtocolError, ValueError, TypeError):
        return f"bytes that are no frame ({frame[:32].hex(' ')})"
    return f"epoch {epoch}, step {step}, round {index}, {dtype} of shape {tuple(shape)}"
