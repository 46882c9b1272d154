"""The opening of authenticated connections, for which one end listens and the other connects.

A connection leaves this module as a plain socket, whose other end has proved the launch's secret
and told its rank. This module knows nothing of what is sent over it then.
"""

from __future__ import annotations

import contextlib
import ipaddress
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Self

from cqil_dist.errors import ExchangeError, PeerLost, ProtocolError
from cqil_dist.exchange.handshake import ANSWER_BYTES, Acceptor, introduce
from cqil_dist.exchange.sockets import format_address, prepare

_BACKLOG = 128  # connections that the kernel holds until they are accepted
# The time for a handshake, and how many may be pending: the oldest is closed to make room.
_HANDSHAKE_S = 5.0
_MAX_PENDING = 128


class Listener:
    """A port at `address` ("host:port") to which the ranks of one epoch of a launch connect."""

    def __init__(self, host: str, secret: bytes, epoch: int) -> None:
        """Listen on a free port of `host`: an address or name of this node, never all of them.

        Raises:
            ExchangeError: `host` means every interface.
            OSError: `host` is not an address of this node, or no port is free.
        """
        try:
            # An empty name would mean every interface too.
            found = socket.getaddrinfo(host or "0.0.0.0", 0, type=socket.SOCK_STREAM)
            family, _, _, _, address = found[0]
            if ipaddress.ip_address(address[0]).is_unspecified:
                raise ExchangeError(
                    f"refusing to listen on {host!r}, which is every interface; name the address "
                    "that the other ranks reach this node by"
                )
            self._sock = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        except OSError as error:
            raise OSError(f"cannot listen on {host!r}: {error}") from error
        self._sock.setblocking(False)
        self._secret = secret
        self._epoch = epoch
        self.address = format_address(self._sock.getsockname())

    def accept_peers(self, expected: set[int], deadline_s: float) -> dict[int, socket.socket]:
        """Wait until each expected rank has connected once.

        Connections that do not prove the secret, or that claim another epoch or a rank that is not
        expected, are closed; the others are neither disturbed nor delayed by them.

        Returns:
            A non-blocking socket for each expected rank.

        Raises:
            PeerLost: some ranks did not connect within `deadline_s`; no connection is left open.
        """
        deadline = time.monotonic() + deadline_s
        joined: dict[int, socket.socket] = {}
        with _Pending(self._sock, self._secret, self._epoch) as pending:
            try:
                while missing := expected - joined.keys():
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        raise PeerLost(
                            min(missing),
                            "an unknown address",
                            f"ranks {sorted(missing)} did not connect to {self.address} within "
                            f"{deadline_s:g} s",
                        )
                    for rank, sock in pending.serve(remaining):
                        if rank in expected and rank not in joined:
                            joined[rank] = sock
                        else:
                            sock.close()
            except BaseException:
                for sock in joined.values():
                    sock.close()
                raise
        return joined

    def close(self) -> None:
        """Stop listening; connections that were accepted stay open."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Pending:
    """The connections whose handshake is not complete, all served by one loop.

    Greetings and proofs are far smaller than a socket's buffer, so sending them never blocks.
    """

    def __init__(self, listening: socket.socket, secret: bytes, epoch: int) -> None:
        self._listening = listening
        self._secret = secret
        self._epoch = epoch
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)
        # In order of arrival: acceptor, the answer so far, and the time at which it must be whole.
        self._connections: dict[socket.socket, tuple[Acceptor, bytearray, float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for sock in self._connections:
            sock.close()

    def serve(self, timeout_s: float) -> list[tuple[int, socket.socket]]:
        """Wait for events, and return rank and socket of the connections that proved themselves."""
        joined: list[tuple[int, socket.socket]] = []
        self._drop_expired()
        for key, _ in self._selector.select(min(timeout_s, _HANDSHAKE_S)):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if sock is self._listening:
                self._accept()
            elif sock in self._connections:  # it was not dropped just now to make room
                try:
                    rank = self._read(sock)
                except (ProtocolError, OSError):
                    self._drop(sock)
                else:
                    if rank is not None:
                        self._forget(sock)
                        joined.append((rank, sock))
        return joined

    def _accept(self) -> None:
        try:
            sock, address = self._listening.accept()
        except OSError:  # the other end is gone again, or this process has no descriptor left
            return
        if len(self._connections) >= _MAX_PENDING:
            self._drop(next(iter(self._connections)))
        acceptor = Acceptor(self._secret, self._epoch, format_address(address))
        self._connections[sock] = (acceptor, bytearray(), time.monotonic() + _HANDSHAKE_S)
        self._selector.register(sock, selectors.EVENT_READ)
        try:
            prepare(sock)
            sock.send(acceptor.greeting)
        except OSError:
            self._drop(sock)

    def _read(self, sock: socket.socket) -> int | None:
        """Return the rank at the other end, or None as long as its answer is not complete."""
        acceptor, answer, _ = self._connections[sock]
        data = sock.recv(ANSWER_BYTES - len(answer))
        if not data:
            raise ProtocolError("closed during the handshake")
        answer += data
        if len(answer) < ANSWER_BYTES:
            return None
        rank, proof = acceptor.verify(bytes(answer))
        sock.send(proof)
        return rank

    def _drop_expired(self) -> None:
        now = time.monotonic()
        for sock in [s for s, (_, _, expiry) in self._connections.items() if expiry <= now]:
            self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        self._forget(sock)
        sock.close()

    def _forget(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._connections[sock]


def connect(
    address: str, rank: int, peer: int, secret: bytes, epoch: int, deadline_s: float
) -> socket.socket:
    """Connect `rank` to the listener of rank `peer` at "host:port", and go through the handshake.

    Returns:
        A non-blocking socket.

    Raises:
        PeerLost: nobody answers at the address within `deadline_s`.
        ProtocolError: whoever answers is not of this launch and epoch, or refuses this rank.
    """
    deadline = time.monotonic() + deadline_s
    host, _, port = address.rpartition(":")
    try:
        sock = socket.create_connection((host.strip("[]"), int(port)), timeout=deadline_s)
    except (OSError, ValueError) as error:
        raise PeerLost(peer, address, f"cannot connect: {error}") from error
    introduce(sock, secret, rank, epoch, address, deadline - time.monotonic())
    prepare(sock)
    return sock


def connect_mesh(
    listener: Listener,
    rank: int,
    addresses: Mapping[int, str],
    secret: bytes,
    epoch: int,
    deadline_s: float,
    extra: set[int] | None = None,
) -> dict[int, socket.socket]:
    """Make all connections of one rank: it connects to lower ranks, and higher ranks connect to it.

    Args:
        listener: this rank's own listener, at `addresses[rank]`.
        addresses: "host:port" of every rank's listener.
        extra: others that connect to this rank, such as the coordinator.

    Returns:
        A non-blocking socket for each other rank and each of `extra`.

    Raises:
        PeerLost, ProtocolError: as `connect` and `Listener.accept_peers` do; nothing is left open.
    """
    deadline = time.monotonic() + deadline_s
    sockets: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as on_failure:
        for peer in sorted(peer for peer in addresses if peer < rank):
            remaining = deadline - time.monotonic()
            sock = connect(addresses[peer], rank, peer, secret, epoch, max(remaining, 0.001))
            sockets[peer] = on_failure.enter_context(sock)
        higher = {peer for peer in addresses if peer > rank} | (extra or set())
        sockets |= listener.accept_peers(higher, deadline - time.monotonic())
        on_failure.pop_all()
    return sockets
