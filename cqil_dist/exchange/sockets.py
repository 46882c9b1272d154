"""What all connections share: their set-up, waiting for them, and what a partial send leaves.

This module knows nothing of frames, ranks or secrets.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Mapping, Sequence

# Probes after 2 s of silence, one a second, three of them.
_KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}


def prepare(sock: socket.socket) -> None:
    """Set up a connection for small frames: no delay, no blocking, and no silent end.

    A node that vanishes closes nothing, but its kernel does not answer probes either, which ends an
    idle connection after some seconds. Where data is under way, the deadline of its step does.
    (TCP_USER_TIMEOUT would end it sooner, and with it the connection of a peer that is merely too
    busy to read.)
    """
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        if (number := getattr(socket, option, None)) is not None:  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, number, value)


def format_address(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """A socket's address as "host:port", with brackets around an IPv6 host."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def wait_ready(events: Mapping[socket.socket, int], deadline: float | None) -> bool:
    """Sleep until one of the sockets is ready for its poll events, or has failed or been closed.

    Args:
        events: `select.POLLIN` and `select.POLLOUT` masks.
        deadline: on the clock of `time.monotonic`; None waits for ever.

    Returns:
        False if the deadline came first.
    """
    poller = select.poll()
    for sock, mask in events.items():
        poller.register(sock, mask)
    if deadline is None:
        return bool(poller.poll())
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))


def unsent(views: Sequence[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """What remains of byte `views` once their first `sent` bytes are on their way."""
    remaining = []
    for view in views:
        if sent < len(view):
            remaining.append(view[sent:])
        sent = max(0, sent - len(view))
    return remaining
