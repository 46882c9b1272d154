"""ASGI middleware between the network and the app: a log, API keys, and bounds on request bodies.

A request that middleware refuses is never parsed.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cqil_dist.rpc.bearer_key import BearerKey
from cqil_dist.serving.http_errors import error_response

logger = logging.getLogger(__name__)

_LONGEST_PATH = 200  # characters of a path that are logged


class RequireKey:
    """Middleware that answers 401 to requests for certain paths that do not carry the API key.

    Args:
        app: the app that gets the other requests.
        key: the API key; with None all requests pass.
        prefixes: what the paths begin with that need the key.
    """

    def __init__(self, app: ASGIApp, key: str | None, prefixes: tuple[str, ...]) -> None:
        self._app = app
        self._key = None if key is None else BearerKey(key)
        self._prefixes = prefixes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allows(scope):
            await self._app(scope, receive, send)
            return
        message = "give the service's key as the header 'Authorization: Bearer <key>'"
        await error_response(401, message)(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        if self._key is None or not scope["path"].startswith(self._prefixes):
            return True
        return self._key.admits(dict(scope["headers"]).get(b"authorization", b""))


class BoundedBody:
    """Middleware that reads a request's whole body, within bounds, before the app sees the request.

    Args:
        app: the app that gets the request, with its body in one message.
        prefix: what the paths begin with that take bodies; the bodies of others are not read.
        max_bytes: most bytes of a body; larger ones are answered with 413.
        timeout_s: seconds for the whole body to arrive; slower ones are answered with 408.
    """

    def __init__(self, app: ASGIApp, prefix: str, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._prefix = prefix
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self._prefix):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(scope, receive)
        except TimeoutError:
            message = f"the body did not come within {self._timeout_s:g} s"
            await error_response(408, message)(scope, receive, send)
            return
        if body is None:
            message = f"the body is larger than {self._max_bytes} bytes"
            await error_response(413, message)(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None if it is too large, only its beginning if the client hangs up."""
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self._max_bytes:
            return None
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


class RequestLog:
    """Middleware that logs each request's method, path, status and duration, no bodies or keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            logger.info(
                "%s %r %s %.0f ms",
                scope["method"],
                scope["path"][:_LONGEST_PATH],
                status or "no answer",
                1000 * (time.monotonic() - started),
            )
