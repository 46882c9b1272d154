"""Messages between the coordinator and one rank, over one authenticated connection.

A message is a dict of plain values, and one tensor or none. This module knows nothing of what the
messages mean.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cqil_dist.errors import ExchangeError, PeerLost, ProtocolError
from cqil_dist.exchange import framing
from cqil_dist.exchange.sockets import prepare, unsent, wait_ready

PAYLOAD_KEY = "payload"
"""The key of the header entry [dtype code, *shape] that `Link` itself writes and reads."""

Message = tuple[dict[str, Any], Tensor | None]

_CLOSED_HERE = "this end closed the connection"


class Link:
    """A connection that carries whole messages in both directions.

    One thread may send while another receives; `close` may come from any thread.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: int,
        address: str,
        max_bytes: int,
        send_deadline_s: float,
    ) -> None:
        """Take over an authenticated connection.

        Args:
            sock: the connection's socket, which `close` closes.
            peer: rank at the other end (-1 is the coordinator).
            address: "host:port" of the other end, for errors' messages.
            max_bytes: most bytes of a tensor in either direction.
            send_deadline_s: seconds that a send may wait for the peer to make room.
        """
        prepare(sock)
        self.peer = peer
        self.address = address
        self._sock = sock
        self._max_bytes = max_bytes
        self._send_deadline_s = send_deadline_s
        self._inbox = _Inbox(max_bytes)
        self._closed = False
        # Held while the socket is in use: if it were closed meanwhile, the same descriptor could
        # already belong to another file.
        self._sending = threading.Lock()
        self._receiving = threading.Lock()

    def send(self, header: Mapping[str, Any], payload: Tensor | None = None) -> None:
        """Send one message, and return when the kernel has all of it.

        Args:
            header: plain values under string keys other than "payload".
            payload: a contiguous CPU tensor.

        Raises:
            PeerLost: the connection is closed, or the peer made no room before the deadline.
            ExchangeError: the message is over a bound, or the header has the key "payload".
        """
        if PAYLOAD_KEY in header:
            raise ExchangeError(f"header key {PAYLOAD_KEY!r} is taken; name the entry otherwise")
        entry = {} if payload is None else {PAYLOAD_KEY: framing.describe_tensor(payload)}
        body = memoryview(b"") if payload is None else framing.memory_of(payload)
        head = framing.encode_head({**header, **entry}, body.nbytes, self._max_bytes)
        views: Sequence[bytes | memoryview] = [head, body]
        left = len(head) + body.nbytes
        deadline = time.monotonic() + self._send_deadline_s
        with self._sending:
            while left:
                sent = self._send_some(views, deadline)
                left -= sent
                if left:
                    views = unsent(views, sent)

    def recv(self, timeout: float | None) -> Message:
        """Wait for the next message.

        Args:
            timeout: seconds to wait; None waits for ever.

        Raises:
            PeerLost: the connection is closed, or no whole message came within `timeout`. After
                a timeout the link is still good: the next receive goes on with the same message.
            ProtocolError: the bytes that came are no message.
        """
        return recv_each([self], timeout)[0]

    def check(self) -> None:
        """Raise PeerLost if either end has closed the connection, without waiting or reading."""
        if self._closed:
            raise self._lost(_CLOSED_HERE)
        if wait_ready({self._sock: select.POLLRDHUP}, deadline=0):
            raise self._lost("it closed the connection")

    def close(self) -> None:
        """Close the connection, and wake a blocked send or receive, which then raises PeerLost."""
        self.shut_down()
        with self._sending, self._receiving:
            self._sock.close()

    def shut_down(self) -> None:
        """Do as `close`, but leave the socket open for a send or receive that has yet to return."""
        self._closed = True
        with contextlib.suppress(OSError):  # not connected any more
            self._sock.shutdown(socket.SHUT_RDWR)

    def _send_some(self, views: Sequence[bytes | memoryview], deadline: float) -> int:
        """Send what the kernel takes at once; return its bytes, or 0 after a wait for room."""
        if self._closed:
            raise self._lost(_CLOSED_HERE)
        try:
            return self._sock.sendmsg(views)
        except BlockingIOError:
            if wait_ready({self._sock: select.POLLOUT}, deadline):
                return 0
            self.shut_down()  # nothing can follow a message that was sent in part
            late = f"it made no room for a message within {self._send_deadline_s:g} s"
            raise self._lost(late) from None
        except OSError as error:
            raise self._lost(f"sending failed: {error}") from error

    def _try_receive(self) -> Message | None:
        """Return the next message if all of it has come. The caller holds the lock `_receiving`."""
        try:
            while not self._closed:
                if message := self._inbox.take():
                    return message
                if not self._inbox.fill(self._sock):
                    break
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._lost(f"receiving failed: {error}") from error
        except ProtocolError as error:
            name = "the coordinator" if self.peer < 0 else f"rank {self.peer}"
            raise ProtocolError(f"{name} at {self.address}: {error}") from error
        raise self._lost(_CLOSED_HERE if self._closed else "it closed the connection")

    def _lost(self, reason: str) -> PeerLost:
        return PeerLost(self.peer, self.address, reason)


def recv_each(links: Sequence[Link], timeout: float | None) -> list[Message]:
    """Wait until one message has come from every link.

    Args:
        links: the links to receive from, each at most once.
        timeout: seconds to wait for all messages together; None waits for ever.

    Returns:
        The messages in the order of `links`.

    Raises:
        PeerLost: a link whose message had not come was closed, or not all messages came within
            `timeout`; the error names one such link. Messages that had come are dropped.
        ProtocolError: the bytes that came on a link are no message.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    messages: dict[Link, Message] = {}
    with contextlib.ExitStack() as locks:
        for link in links:
            locks.enter_context(link._receiving)
        while True:
            for link in links:
                if link not in messages and (message := link._try_receive()):
                    messages[link] = message
            if len(messages) == len(links):
                return [messages[link] for link in links]
            waiting = [link for link in links if link not in messages]
            if not wait_ready({link._sock: select.POLLIN for link in waiting}, deadline):
                owing = [link.peer for link in waiting]
                raise waiting[0]._lost(f"no message within {timeout:g} s (ranks owing: {owing})")


class _Inbox:
    """The bytes that have come of the next message, and perhaps of the one after it.

    Prefix and header go through a small buffer, along with the part of the payload that comes in
    the same read; the rest of a long payload is received straight into its tensor.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = memoryview(bytearray(framing.PREFIX.size + framing.MAX_HEADER_BYTES))
        self._held = 0
        self._message: Message | None = None
        self._body = memoryview(bytearray())
        self._filled = 0

    def fill(self, sock: socket.socket) -> int:
        """Receive what has come, and return how much; 0 if the other end closed the connection.

        Raises OSError as the socket does, and BlockingIOError if nothing has come.
        """
        if self._message is None:
            received = sock.recv_into(self._buffer[self._held :])
            self._held += received
        else:
            received = sock.recv_into(self._body[self._filled :])
            self._filled += received
        return received

    def take(self) -> Message | None:
        """Remove and return the next message if it is complete. Raises ProtocolError."""
        if self._message is None and self._held >= framing.PREFIX.size:
            self._begin()
        if self._message is None or self._filled < self._body.nbytes:
            return None
        message, self._message = self._message, None
        return message

    def _begin(self) -> None:
        """Decode prefix and header if all of them have come, and move the bytes after them."""
        header_bytes, payload_bytes = framing.decode_prefix(self._buffer, self._max_bytes)
        start = framing.PREFIX.size + header_bytes
        if self._held < start:
            return
        header = framing.decode_header(self._buffer[framing.PREFIX.size : start])
        if not isinstance(header, dict):
            raise ProtocolError(f"a message's header is a dict, not {header!r}")
        payload = None
        self._body = memoryview(bytearray())
        if PAYLOAD_KEY in header:
            dtype, shape = framing.decode_tensor_entry(header.pop(PAYLOAD_KEY), payload_bytes)
            payload = torch.empty(shape, dtype=dtype)
            self._body = framing.memory_of(payload)
        elif payload_bytes:
            raise ProtocolError(f"{payload_bytes} bytes of payload without {PAYLOAD_KEY!r} entry")
        self._message = header, payload
        self._filled = min(payload_bytes, self._held - start)
        self._body[: self._filled] = self._buffer[start : start + self._filled]
        rest = self._buffer[start + self._filled : self._held]
        self._held = rest.nbytes
        self._buffer[: rest.nbytes] = rest
