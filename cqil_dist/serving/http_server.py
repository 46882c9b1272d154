"""The HTTP server: uvicorn in the service's event loop, with limits on waiting for clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from cqil_dist.serving.serve_config import Tls

_HEADERS_S = 10.0
_IDLE_S = 75
_LATE_ANSWER_S = 5


class TimedProtocol(H11Protocol):
    """An HTTP/1.1 connection that closes when a request's headers do not arrive in time.

    uvicorn alone waits for ever for the first request of a connection, and for the rest of a
    request that has begun.
    """

    _headers_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        awaits_headers = self.cycle is None or self.cycle.response_complete
        if awaits_headers and self._headers_timer is None and not self.transport.is_closing():
            self._expect_headers()
        elif not awaits_headers:
            self._cancel_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no valid HTTP with status 400, or close if that is too late.

        It is too late where the request was answered before its whole body had come.
        """
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._headers_timer = self.loop.call_later(_HEADERS_S, self._hang_up)

    def _cancel_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _hang_up(self) -> None:
        self._headers_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class HttpServer(uvicorn.Server):
    """A uvicorn server for one app; `serve(sockets=[...])` runs it until `stop`."""

    def __init__(self, app: ASGIApp, tls: Tls | None) -> None:
        config = uvicorn.Config(
            app,
            http=TimedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=_LATE_ANSWER_S,
            ssl_certfile=None if tls is None else str(tls.cert),
            ssl_keyfile=None if tls is None else str(tls.key),
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the service handles them, and stops its servers in its own order."""
        yield

    def stop(self) -> None:
        """Make `serve` return once the requests in progress are answered, or after 5 s."""
        self.should_exit = True
