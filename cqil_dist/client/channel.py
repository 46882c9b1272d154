"""Connects a client to a service: addresses, keys, TLS, and the options of the connection."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import grpc.aio

from cqil_dist.errors import ConfigError, ServiceUnavailable
from cqil_dist.rpc.options import DIRECT, KEEPALIVE, LET_IN, LONG_ANSWERS, RECONNECTING
from cqil_dist.rpc.v1 import generation_pb2_grpc as rpc

ANSWER_S = 30.0
"""The most seconds that a call with a single answer may take."""


@dataclass(frozen=True)
class Endpoint:
    """The address of a service, and the credentials that it asks for.

    Attributes:
        address: "host:port".
        api_key: sent with every call; None sends none.
        tls: whether the connection is encrypted, and the server's certificate checked.
        ca_cert: a file of the certificates to check it against; None takes the system's.
        direct: whether the HTTP proxy that the environment may name is passed by.

    Raises:
        ConfigError: a certificate is given but no TLS, or the key cannot be sent.
    """

    address: str
    api_key: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_cert: Path | None = None
    direct: bool = False

    def __post_init__(self) -> None:
        if self.ca_cert is not None and not self.tls:
            raise ConfigError(
                f"ca_cert is {self.ca_cert} but tls is off, which would send everything in the "
                "clear; set tls=True, or leave ca_cert out"
            )
        key = self.api_key or ""
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                "api_key has characters that cannot be sent; printable ASCII it must be, without "
                "a line's end"
            )

    def at(self, address: str) -> Endpoint:
        """Copy the endpoint with another address."""
        return replace(self, address=address)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata sent with every call: the key, if there is one."""
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    @property
    def options(self) -> tuple[tuple[str, int], ...]:
        """Return the channel's gRPC options."""
        return KEEPALIVE + RECONNECTING + LONG_ANSWERS + (DIRECT if self.direct else ())

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return the credentials of an encrypted channel; None where there is no TLS."""
        if not self.tls:
            return None
        return grpc.ssl_channel_credentials(self.ca_cert.read_bytes() if self.ca_cert else None)


class Connection:
    """An open channel to an endpoint.

    Args:
        library: `grpc`, or `grpc.aio` for the event loop that runs.
    """

    def __init__(self, endpoint: Endpoint, library: ModuleType) -> None:
        self.endpoint = endpoint
        address, options = endpoint.address, endpoint.options
        if (credentials := endpoint.credentials) is None:
            self.channel = library.insecure_channel(address, options=options)
        else:
            self.channel = library.secure_channel(address, credentials, options=options)
        self.stub = rpc.GenerationServiceStub(self.channel)

    def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        """Begin a call. Raises ServiceUnavailable if the connection has been closed."""
        try:
            begin = getattr(self.stub, method)
            return begin(request, timeout=timeout_s, metadata=self.endpoint.metadata)
        except (ValueError, grpc.aio.UsageError) as error:
            raise self.closed() from error

    @staticmethod
    def let_in(metadata: Any) -> bool:
        """Tell from a call's initial metadata whether the service has let its request in."""
        return LET_IN in [tuple(entry) for entry in metadata or ()]

    def closed(self) -> ServiceUnavailable:
        """Make the error that calls on a closed connection end with."""
        return ServiceUnavailable(f"the connection to {self.endpoint.address} is closed")
