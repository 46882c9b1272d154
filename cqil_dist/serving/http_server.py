"""uvicorn as this service runs it: in a loop of ours, and patient with nobody for ever."""

from __future__ import annotations

import asyncio
import socket
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
    """Hangs up on a client whose request's headers do not come in time.

    uvicorn itself waits for ever for the rest of a request that has begun, and for the first one of
    a connection.
    """

    _headers_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._headers_timer is None and not self.transport.is_closing():
            self._expect_headers()
        elif not waits:
            self._forget_headers()

    def send_400_response(self, msg: str) -> None:
        """Where it is not too late for that: a request may be answered before its body has come."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_headers()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._headers_timer = self.loop.call_later(_HEADERS_S, self._hang_up)

    def _forget_headers(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _hang_up(self) -> None:
        self._headers_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class HttpServer(uvicorn.Server):
    """Serves an app on a socket until `stop`."""

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
        """Signals are the whole service's, which ends in an order of its own."""
        yield

    async def run_on(self, sock: socket.socket) -> None:
        await self.serve(sockets=[sock])

    def stop(self) -> None:
        """Answer what has been asked, and end."""
        self.should_exit = True
