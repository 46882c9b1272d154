"""HTTP as raw bytes on a socket, at any pace and in any form, and the answers to them."""

from __future__ import annotations

import json
import socket
import struct
from http.client import parse_headers
from typing import Any

from helpers.served import MODEL, Served

MAX_BODY = 100_000
JSON = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"


class Connection(socket.socket):
    """A connection to the service's HTTP port."""

    def __init__(self, service: Served, timeout_s: float = 20) -> None:
        super().__init__()
        host, _, port = service.addresses.http.removeprefix("http://").rpartition(":")
        self.settimeout(timeout_s)
        self.connect((host, int(port)))
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = self.makefile("rb")  # one for all answers: it reads ahead

    def answer(self, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """The next answer's status, headers (with names in lower case) and body."""
        status = int(self._reader.readline().split()[1])
        headers = {name.lower(): value for name, value in parse_headers(self._reader).items()}
        if method == "HEAD":
            return status, headers, b""
        if "chunked" in headers.get("transfer-encoding", ""):
            return status, headers, b"".join(self._chunks())
        if (length := headers.get("content-length")) is not None:
            return status, headers, self._reader.read(int(length))
        return status, headers, self._reader.read()

    def _chunks(self) -> list[bytes]:
        chunks: list[bytes] = []
        while True:
            length = int(self._reader.readline(), 16)
            chunks.append(self._reader.read(length))
            self._reader.readline()
            if not length:
                return chunks

    def closes(self) -> bool:
        """Whether the service closes within the connection's timeout; what it sends is dropped."""
        try:
            while self.recv(1 << 16):
                """The service still sends."""
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self._reader.close()
        super().close()

    def reset(self) -> None:
        """Close with a reset, as a killed program does, which the service sees as an error."""
        self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """The bytes of a request, with the length of its body unless headers state that."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    stated = any(header.lower().startswith(("content-length", "transfer")) for header in headers)
    if body and not stated:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(**fields: Any) -> bytes:
    """The bytes of a request for a completion."""
    body = {"model": MODEL, "prompt": "The harbour", "max_tokens": 2, **fields}
    return posted(json.dumps(body).encode())


def posted(body: bytes, *headers: str) -> bytes:
    """The bytes of a request for a completion with any body."""
    return request(
        "POST", "/v1/completions", body, *(headers or ("Content-Type: application/json",))
    )


def ask(service: Served, data: bytes) -> tuple[int, Any]:
    """Send bytes on a new connection; return the answer's status, and its JSON or text."""
    with Connection(service) as connection:
        connection.sendall(data)
        status, headers, body = connection.answer()
    if headers["content-type"] == "application/json":
        return status, json.loads(body)
    return status, body.decode()
