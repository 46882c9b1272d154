"""How a service faces the network, as plain, checked values: addresses, keys, TLS and bounds."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from cqil_dist.errors import LaunchError
from cqil_dist.settings import check_settings, number, setting, whole

LOOPBACK = "127.0.0.1"

_PORT = whole(0, 65535)


@dataclass(frozen=True)
class Tls:
    """The PEM files of a certificate chain and of its private key."""

    cert: Path
    key: Path

    def pair(self) -> tuple[bytes, bytes]:
        """Return the contents of the key file and of the certificate file, in gRPC's order.

        Raises:
            LaunchError: a file cannot be read, or the two do not belong together.
        """
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key)
            return self.key.read_bytes(), self.cert.read_bytes()
        except OSError as error:  # ssl's own errors are among them
            raise LaunchError(
                f"the TLS certificate {self.cert} with the key {self.key} cannot be used: {error}"
            ) from error


@dataclass(frozen=True)
class ServeConfig:
    """The network settings and limits of a service; docs/serving.md has a table of the fields.

    Attributes:
        tls: the certificate to serve with; None serves unencrypted.

    Raises:
        LaunchError: naming the field, its value and the rule.
    """

    host: str = setting(LOOPBACK, "Address to listen on; 0.0.0.0 lets other machines in.")
    grpc_port: int = setting(50051, "Port of the gRPC service; 0 takes a free one.", _PORT)
    http_port: int = setting(8000, "Port of the HTTP service; 0 takes a free one.", _PORT)
    api_key: str | None = setting(
        None,
        "Key that every request must carry; the environment hides it from process lists.",
        unset="everybody is let in",
        envvar="CQIL_API_KEY",
        secret=True,
    )
    tls: Tls | None = None
    request_timeout_s: float = setting(600.0, "Most seconds that a request may take.", number())
    drain_timeout_s: float = setting(
        30.0,
        "Seconds that running requests have to finish when the service ends.",
        number(zero=True),
    )
    recovery_bound_s: float = setting(
        10.0,
        "Seconds that a recovery may take before the service calls itself unhealthy; requests are "
        "let in all the while.",
        number(),
    )
    max_body_bytes: int = setting(4 << 20, "Most bytes of a request's body.", whole(1))
    body_timeout_s: float = setting(
        20.0, "Seconds that a request's body may take to come.", number(), is_option=False
    )

    def __post_init__(self) -> None:
        check_settings(self, LaunchError)
        if self.grpc_port and self.grpc_port == self.http_port:
            raise LaunchError(f"grpc_port and http_port are both {self.http_port}; give two")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise LaunchError("api_key holds characters that a header cannot carry; use ASCII")
        if self.api_key is not None and (not self.api_key or self.api_key != self.api_key.strip()):
            raise LaunchError(
                "api_key is empty, or begins or ends with blanks, which headers lose; leave it out "
                "to let everybody in"
            )

    def address(self, port: int) -> str:
        """Return a port of this service as "host:port", with brackets around an IPv6 host."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    def url(self, port: int) -> str:
        """Return the URL of the HTTP server on this port."""
        return f"{'https' if self.tls else 'http'}://{self.address(port)}"

    def listen(self, port: int) -> socket.socket:
        """Return a socket that listens on this port (0 takes a free one), or raise LaunchError."""
        both = ":" in self.host and socket.has_dualstack_ipv6()  # as gRPC does
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            sock = socket.create_server(
                (self.host, port), family=family, backlog=1024, dualstack_ipv6=both
            )
        except OSError as error:
            address = self.address(port)
            raise LaunchError(f"cannot serve at {address}: {error}; is the port taken?") from error
        # asyncio turns Nagle's algorithm off only for sockets that name their protocol. With it a
        # small packet, such as an event, waits 40 ms for the one before it to be acknowledged.
        return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, sock.detach())

    def check(self) -> None:
        """Check that the ports are free and the TLS files good, before a model is loaded.

        Raises:
            LaunchError: a port is taken, or a TLS file cannot be used.
        """
        for port in (self.grpc_port, self.http_port):
            self.listen(port).close()
        if self.tls is not None:
            self.tls.pair()

    @property
    def is_public(self) -> bool:
        """Return whether other machines can reach the service."""
        return self.host not in (LOOPBACK, "localhost", "::1")
