"""How a client reaches a service: addresses, keys, TLS, and the options of the connection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import grpc

MAX_MESSAGE_BYTES = 64 << 20
"""gRPC's default of 4 MiB is little for a long completion with 20 alternatives a token."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A service whose node has vanished closes nothing: ask whether it is still there.
    ("grpc.keepalive_time_ms", 3000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),  # what a server puts up with
    # One that comes back is found as soon as it is asked for.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
# Ours are the cluster's own addresses, which no proxy leads to.
_DIRECT = (("grpc.enable_http_proxy", 0),)


@dataclass(frozen=True)
class Endpoint:
    """A service's address, and what it takes to be let in.

    Attributes:
        address: "host:port".
        api_key: sent with every call; None sends none.
        tls: whether the connection is encrypted, and the server's certificate checked.
        ca_cert: a file of the certificates to check it against; None takes the system's.
        direct: never through the HTTP proxy that the environment may name.
    """

    address: str
    api_key: str | None = None
    tls: bool = False
    ca_cert: Path | None = None
    direct: bool = False

    def at(self, address: str) -> Endpoint:
        """The same service, elsewhere."""
        return replace(self, address=address)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    @property
    def options(self) -> tuple[tuple[str, int], ...]:
        return CHANNEL_OPTIONS + (_DIRECT if self.direct else ())

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        if not self.tls:
            return None
        return grpc.ssl_channel_credentials(self.ca_cert.read_bytes() if self.ca_cert else None)
