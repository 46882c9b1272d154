"""How a service faces the network: addresses, keys, TLS and bounds. Plain, checked values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cqil_dist.errors import LaunchError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Tls:
    """A certificate and its key, in PEM files."""

    cert: Path
    key: Path

    def pair(self) -> tuple[bytes, bytes]:
        """Key and certificate chain, as gRPC takes them. Raises LaunchError."""
        try:
            return self.key.read_bytes(), self.cert.read_bytes()
        except OSError as error:
            raise LaunchError(f"cannot read the TLS certificate or its key: {error}") from error


@dataclass(frozen=True)
class ServeConfig:
    """How a service faces the network.

    Attributes:
        host: address to listen on; the default is this machine alone.
        grpc_port, http_port: 0 takes a free one.
        api_key: that every request must carry; None lets everybody in.
        tls: None serves unencrypted.
        request_timeout_s: most seconds that a request may take.
        drain_timeout_s: seconds that running requests have to finish when the service ends.
        recovery_bound_s: seconds that the ranks may take to recover from a loss before the service
            calls itself unhealthy. Requests are let in all the while.
        max_body_bytes: of a request.
        body_timeout_s: for the whole of a request's body to come.

    Raises:
        LaunchError: naming the value and the rule.
    """

    host: str = LOOPBACK
    grpc_port: int = 50051
    http_port: int = 8000
    api_key: str | None = None
    tls: Tls | None = None
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    recovery_bound_s: float = 10.0
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("grpc_port", "http_port"):
            if not 0 <= (port := getattr(self, name)) < 65536:
                raise LaunchError(f"{name} is {port} but must be a port, 0 to 65535")
        if self.grpc_port and self.grpc_port == self.http_port:
            raise LaunchError(f"grpc_port and http_port are both {self.http_port}; give two")
        for name in ("request_timeout_s", "recovery_bound_s", "max_body_bytes", "body_timeout_s"):
            if not (value := getattr(self, name)) > 0:
                raise LaunchError(f"{name} is {value!r} but must be above 0")
        if self.drain_timeout_s < 0:
            raise LaunchError(f"drain_timeout_s is {self.drain_timeout_s!r} but must be 0 or more")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise LaunchError("api_key holds characters that a header cannot carry; use ASCII")
        if self.api_key == "":
            raise LaunchError("api_key is empty; leave it out to let everybody in")

    def address(self, port: int) -> str:
        """The "host:port" to bind."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    def url(self, port: int) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address(port)}"

    @property
    def is_public(self) -> bool:
        """Whether other machines can reach it."""
        return self.host not in (LOOPBACK, "localhost", "::1")
