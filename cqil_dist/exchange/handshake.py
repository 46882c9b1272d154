"""The handshake of a connection, in which both ends prove that they know the launch's secret.

    acceptor  -> connector   greeting: magic, protocol version, nonce
    connector -> acceptor    answer: its rank, the epoch, a nonce, HMAC("connector", all the above)
    acceptor  -> connector   proof: HMAC("acceptor", all the above)

The HMACs are of RFC 2104, over SHA-256. Every message has a fixed size, so that an unauthenticated
peer chooses no length. The role in each HMAC keeps one end's proof from being played back to it as
the other's, and the nonces keep an old conversation from being replayed. Later bytes are neither
signed nor encrypted: the network between ranks must be one that outsiders cannot join.

Connections between ranks and those from the coordinator to ranks begin with the same handshake (the
coordinator is rank -1). This module knows nothing of listening, connecting, or what is sent later.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time

from cqil_dist.errors import ProtocolError

COORDINATOR = -1
SECRET_BYTES = 32

_MAGIC = b"cqildist"
_VERSION = 1
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_GREETING = struct.Struct(f"<8sI{_NONCE_BYTES}s")
_CLAIM = struct.Struct(f"<iI{_NONCE_BYTES}s")  # rank, epoch, nonce
ANSWER_BYTES = _CLAIM.size + _PROOF_BYTES


class Acceptor:
    """The accepting end of one handshake, as bytes in and bytes out.

    The caller sends `greeting`, reads ANSWER_BYTES bytes, passes them to `verify`, and sends the
    proof that it returns. One loop can serve many pending connections in this way.
    """

    def __init__(self, secret: bytes, epoch: int, address: str) -> None:
        self._secret = _checked(secret)
        self._epoch = epoch
        self._address = address
        self.greeting = _GREETING.pack(_MAGIC, _VERSION, secrets.token_bytes(_NONCE_BYTES))

    def verify(self, answer: bytes) -> tuple[int, bytes]:
        """Check the answer; return the connector's rank and the proof to send to it.

        Raises:
            ProtocolError: the connector does not know the secret, or belongs to another epoch.
        """
        claim, proof = answer[: _CLAIM.size], answer[_CLAIM.size :]
        if not hmac.compare_digest(proof, _prove(self._secret, b"connector", self.greeting, claim)):
            raise ProtocolError(
                f"{self._address} does not hold this launch's secret; it belongs to another launch "
                "or is no rank at all"
            )
        rank, epoch, _ = _CLAIM.unpack(claim)
        if epoch != self._epoch:
            raise ProtocolError(
                f"rank {rank} at {self._address} joins epoch {epoch}, but this is epoch "
                f"{self._epoch}"
            )
        return rank, _prove(self._secret, b"acceptor", self.greeting, answer)


def introduce(
    sock: socket.socket, secret: bytes, rank: int, epoch: int, address: str, deadline_s: float
) -> None:
    """Do the connecting end's part of a handshake: prove the secret, and check the other's proof.

    Args:
        sock: a blocking socket connected to the acceptor; closed if the handshake fails.
        secret: the launch's secret, SECRET_BYTES long.
        rank: this end's rank.
        epoch: the epoch that this end belongs to.
        address: the acceptor's "host:port", for messages.
        deadline_s: seconds for the whole handshake.

    Raises:
        ProtocolError: the acceptor speaks another protocol, does not know the secret, refused this
            end, or missed the deadline.
    """
    try:
        deadline = time.monotonic() + deadline_s
        greeting = _read_exactly(sock, _GREETING.size, deadline, address)
        magic, version, _ = _GREETING.unpack(greeting)
        if (magic, version) != (_MAGIC, _VERSION):
            raise ProtocolError(
                f"{address} greets with {magic!r} version {version}, expected {_MAGIC!r} version "
                f"{_VERSION}; run the same release on every node"
            )
        claim = _CLAIM.pack(rank, epoch, secrets.token_bytes(_NONCE_BYTES))
        answer = claim + _prove(_checked(secret), b"connector", greeting, claim)
        sock.sendall(answer)
        proof = _read_exactly(sock, _PROOF_BYTES, deadline, address)
        if not hmac.compare_digest(proof, _prove(secret, b"acceptor", greeting, answer)):
            raise ProtocolError(f"{address} does not hold this launch's secret")
    except OSError as error:
        sock.close()
        raise ProtocolError(f"{address} broke off the handshake: {error}") from error
    except BaseException:
        sock.close()
        raise


def _read_exactly(sock: socket.socket, size: int, deadline: float, address: str) -> bytes:
    received = bytearray()
    while len(received) < size:
        remaining = deadline - time.monotonic()
        try:
            if remaining <= 0:
                raise TimeoutError
            sock.settimeout(remaining)
            data = sock.recv(size - len(received))
        except TimeoutError as error:
            raise ProtocolError(
                f"{address} sent {len(received)} of the handshake's next {size} bytes before the "
                "deadline"
            ) from error
        if not data:
            raise ProtocolError(
                f"{address} closed the connection during the handshake: it refuses this rank, "
                "epoch or secret, or it has stopped"
            )
        received += data
    return bytes(received)


def _checked(secret: bytes) -> bytes:
    if len(secret) != SECRET_BYTES:
        raise ProtocolError(f"a launch's secret has {SECRET_BYTES} bytes, not {len(secret)}")
    return secret


def _prove(secret: bytes, role: bytes, *conversation: bytes) -> bytes:
    return hmac.digest(secret, b"".join((role, *conversation)), "sha256")
