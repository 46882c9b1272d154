"""Helpers for the sockets of all connections: set-up, waiting, and the rest of a partial send.

This module knows nothing of frames, ranks or secrets.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Mapping, Sequence

# After 2 s of silence three probes, one a second.
_KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}


def prepare(sock: socket.socket) -> None:
    """Set up a connection for small frames: non-blocking, without delay, and with keepalive probes.

    A node that vanishes closes no connection, but neither does its kernel answer probes, which ends
    an idle connection after some seconds; where data is under way, the step's deadline ends it.
    (TCP_USER_TIMEOUT would be sooner, but would also end the connection of a peer that is merely
    too busy to read.)
    """
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        if (number := getattr(socket, option, None)) is not None:  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, number, value)


def format_address(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Format a socket's address as "host:port", with brackets around an IPv6 host."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def wait_ready(events: Mapping[socket.socket, int], deadline: float | None) -> bool:
    """Sleep until one of the sockets is ready for its events, or has failed or been closed.

    Args:
        events: a mask of `select.POLLIN` and other events for each socket.
        deadline: a time of `time.monotonic`; None waits for ever.

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
    """Return views of what remains to be sent after the first `sent` bytes of `views`."""
    remaining = []
    for view in views:
        if sent < len(view):
            remaining.append(view[sent:])
        sent = max(0, sent - len(view))
    return remaining
