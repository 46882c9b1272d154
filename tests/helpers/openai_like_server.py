"""A small OpenAI-compatible server whose tokens, pauses and faults are known."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from cqil_dist.serving.serve_config import Tls

PROMPT_TOKENS = 7


@dataclass
class Server:
    """How the server behaves, and what it has seen.

    Attributes:
        tokens: tokens of every answer; each event brings `per_event` of them.
        pause_s: the pause before each event.
        usage: whether it reports token counts when asked to.
        faults: by the number of the request, from 0: "429", "drop" (closes the connection midway),
            "cut" (ends the stream midway), "error" (an event), "ctrl-c" (to the whole process).
        refuses: fields that it refuses a request for.
        bodies: the bodies of the requests.
        under_way, peak: requests in progress, now and at most.
    """

    url: str
    tokens: int = 6
    per_event: int = 1
    pause_s: float = 0.002
    usage: bool = True
    models: tuple[str, ...] | None = ("tiny",)
    api_key: str | None = None
    faults: dict[int, str] = field(default_factory=dict)
    refuses: tuple[str, ...] = ()
    bodies: list[dict[str, Any]] = field(default_factory=list)
    under_way: int = 0
    peak: int = 0

    def list_models(self, request: Request) -> Response:
        if self._is_stranger(request):
            return _error(401, "a key is needed")
        if self.models is None:
            return _error(404, "Not Found")
        return JSONResponse({"data": [{"id": name, "owned_by": "a test"} for name in self.models]})

    async def answer(self, request: Request, chat: bool) -> Response:
        body = await request.json()
        fault = self.faults.get(len(self.bodies))
        self.bodies.append(body)
        if self._is_stranger(request):
            return _error(401, "a key is needed")
        if body["model"] not in (self.models or ("tiny",)):
            return _error(404, f"no model {body['model']}")
        if unknown := [name for name in self.refuses if name in body]:
            return _error(400, f"unknown field {unknown[0]}")
        if fault == "429":
            return _error(429, "too many")
        if fault == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        stream = self._stream(body, fault, chat)
        return StreamingResponse(stream, media_type="text/event-stream; charset=utf-8")

    def _is_stranger(self, request: Request) -> bool:
        key = f"Bearer {self.api_key}"
        return self.api_key is not None and request.headers.get("authorization") != key

    async def _stream(
        self, body: dict[str, Any], fault: str | None, chat: bool
    ) -> AsyncIterator[str]:
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        try:
            async for data in self._events(body, fault, chat):
                yield f"data: {data}\r\n\r\n"
        finally:
            self.under_way -= 1

    async def _events(
        self, body: dict[str, Any], fault: str | None, chat: bool
    ) -> AsyncIterator[str]:
        if chat:  # a first event without text
            yield _event(delta={"role": "assistant", "content": ""})
        for first in range(0, self.tokens, self.per_event):
            await asyncio.sleep(self.pause_s)
            if first >= self.tokens // 2:
                if fault == "drop":
                    raise ConnectionAbortedError
                if fault == "error":
                    yield json.dumps({"error": {"message": "out of memory", "code": 500}})
                if fault in ("error", "cut"):
                    return
            text = "x" * min(self.per_event, self.tokens - first)
            yield _event(delta={"content": text}) if chat else _event(text=text)
        ending: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        yield _event(finish_reason="length", **ending)
        if self.usage and body.get("stream_options", {}).get("include_usage"):
            counts = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": self.tokens}
            yield json.dumps({"choices": [], "usage": counts})
        yield "[DONE]"


Behave: TypeAlias = Callable[..., Server]


@contextmanager
def serving(tls: Tls | None = None) -> Iterator[Behave]:
    """Start a server on a free port of this machine, which behaves as it was last told to.

    Yields:
        A function that takes fields of `Server`, and returns the server as it is from then on.
    """
    with socket.create_server(("127.0.0.1", 0)) as sock:
        # Accepted connections inherit this; asyncio sets it only where a socket names its protocol.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        url = f"{'https' if tls else 'http'}://127.0.0.1:{sock.getsockname()[1]}"
        told = [Server(url)]

        def behave(**fields: Any) -> Server:
            told.append(Server(url, **fields))
            return told[-1]

        config = uvicorn.Config(
            _app(lambda: told[-1]),
            log_config=None,
            lifespan="off",
            ws="none",
            ssl_certfile=None if tls is None else str(tls.cert),
            ssl_keyfile=None if tls is None else str(tls.key),
        )
        http = uvicorn.Server(config)
        thread = threading.Thread(target=http.run, args=([sock],), daemon=True)
        thread.start()
        try:
            yield behave
        finally:
            http.should_exit = True
            thread.join(timeout=10)


def _app(server: Callable[[], Server]) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    def models(request: Request) -> Response:
        return server().list_models(request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await server().answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server().answer(request, chat=True)

    return app


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


def _event(finish_reason: str | None = None, **choice: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "finish_reason": finish_reason, **choice}]})
