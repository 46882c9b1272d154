"""The endpoints under /v1, whose choices are requests that stream side by side."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from cqil_dist.errors import CqilError, RequestError
from cqil_dist.outputs import Chunk, Completion, Usage
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.serving.backend import Backend
from cqil_dist.serving.http_errors import error_body, error_responses
from cqil_dist.serving.openai_api import schema
from cqil_dist.serving.openai_api.answers import (
    Answerer,
    ChatAnswerer,
    CompletionAnswerer,
    Head,
    usage_of,
)
from cqil_dist.serving.openai_api.requests import chat_requests, completion_requests
from cqil_dist.status import ModelInfo

_Result = TypeVar("_Result")
_READ_AHEAD = 1024


@dataclass(frozen=True)
class _Call:
    """One call of an endpoint: its body, its choices' requests, and the maker of its response."""

    body: schema.GenerationRequest
    requests: Sequence[pb.GenerateRequest]
    answerer: Answerer


def openai_routes(backend: Backend) -> APIRouter:
    """Make the endpoints /v1/models, /v1/completions and /v1/chat/completions over a backend."""
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.get("/models", responses=error_responses(401))
    async def models() -> schema.ModelList:
        """The served models: one model, under one plan or under two."""
        return schema.ModelList(data=[_model(model) for model in backend.models])

    @router.get("/models/{model:path}", responses=error_responses(401, 404))
    async def model(model: str) -> schema.Model:
        """One of the served models."""
        return _model(backend.model(model))

    @router.post(
        "/completions",
        response_model=schema.CompletionResponse,
        responses=error_responses(400, 401, 404, 408, 413, 429, 503, 504),
    )
    async def completions(body: schema.CompletionRequest, request: Request) -> Any:
        """Complete one prompt or several."""
        backend.model(body.model)
        head = Head(f"cmpl-{uuid.uuid4().hex}", int(time.time()), body.model)
        answerer = CompletionAnswerer(head, body.return_token_ids)
        call = _Call(body, completion_requests(body, head.id), answerer)
        return await _answer(backend, call, request)

    @router.post(
        "/chat/completions",
        response_model=schema.ChatCompletionResponse,
        responses=error_responses(400, 401, 404, 408, 413, 429, 503, 504),
    )
    async def chat_completions(body: schema.ChatCompletionRequest, request: Request) -> Any:
        """Answer a conversation, formatted by the model's chat template."""
        info = backend.model(body.model)
        head = Head(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), body.model)
        answerer = ChatAnswerer(head, body.return_token_ids)
        call = _Call(body, chat_requests(body, head.id, info.max_len), answerer)
        return await _answer(backend, call, request)

    return router


def _model(info: ModelInfo) -> schema.Model:
    return schema.Model(id=info.name, created=info.created, max_model_len=info.max_len)


async def _answer(backend: Backend, call: _Call, request: Request) -> Response:
    if len(call.requests) > (capacity := backend.admission.capacity):
        raise RequestError(
            f"{len(call.requests)} choices are more than the {capacity} requests "
            "that run and wait here at most; send several requests"
        )
    if not call.body.stream:
        return await _until_disconnected(request, _whole(backend, call))
    events = _events(backend, call)
    # A request that is refused fails before its first event, so its answer can have a status.
    first = await _until_disconnected(request, anext(events))

    async def text() -> AsyncIterator[str]:
        async with aclosing(events):
            yield _sse(first)
            try:
                async for event in events:
                    yield _sse(event)
            except CqilError as error:
                yield _sse(error_body(error))
                return
            yield "data: [DONE]\n\n"

    return _Events(text(), backend.longest_s)


class _Events(StreamingResponse):
    """A server-sent event stream that ends after `timeout_s`, even if the client does not read."""

    def __init__(self, events: AsyncIterator[str], timeout_s: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy holds it back
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await super().__call__(scope, receive, send)


async def _whole(backend: Backend, call: _Call) -> Response:
    completions: dict[int, Completion] = {}
    async with aclosing(_merged(backend, call.requests)) as merged:
        async for index, chunk in merged:
            assert chunk.result is not None, "the only chunk is the last"
            completions[index] = chunk.result
    in_order = [completions[index] for index in range(len(call.requests))]
    usage = usage_of((completion.usage for completion in in_order), call.body.n)
    return JSONResponse(_plain(call.answerer.whole(in_order, usage)))


async def _events(backend: Backend, call: _Call) -> AsyncGenerator[BaseModel, None]:
    """Yield the events of a streamed response, those of all choices in the order they come."""
    usages: dict[int, Usage] = {}
    opened: set[int] = set()
    async with aclosing(_merged(backend, call.requests)) as merged:
        async for index, chunk in merged:
            if index not in opened:
                opened.add(index)
                if (opening := call.answerer.opening(index)) is not None:
                    yield opening
            yield call.answerer.event(index, chunk)
            if chunk.result is not None:
                usages[index] = chunk.result.usage
    if (options := call.body.stream_options) is not None and options.include_usage:
        in_order = (usages[index] for index in range(len(call.requests)))
        yield call.answerer.closing(usage_of(in_order, call.body.n))


async def _merged(
    backend: Backend, requests: Sequence[pb.GenerateRequest]
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yield the chunks of all requests as they come, each with its request's index.

    The first comes when all requests have been accepted; the error of one that is refused is raised
    before. Where one fails, or the caller stops reading, the others are cancelled.
    """
    # Bounded, so that a slow client slows down the reading here; the engine's chunks wait there.
    arrived: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue(_READ_AHEAD)
    accepted = [asyncio.get_running_loop().create_future() for _ in requests]

    async def read(index: int, request: pb.GenerateRequest) -> None:
        end: Exception | None = None

        async def let_in() -> None:
            accepted[index].set_result(None)

        try:
            async with aclosing(backend.stream(request, let_in)) as chunks:
                async for chunk in chunks:
                    await arrived.put((index, chunk))
        except Exception as error:
            end = error
            if not accepted[index].done():
                accepted[index].set_exception(error)
        await arrived.put((index, end))

    reading = [asyncio.create_task(read(*numbered)) for numbered in enumerate(requests)]
    try:
        await asyncio.gather(*accepted)
        ended = 0
        while ended < len(reading):
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                ended += 1
            else:
                yield index, item
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def _until_disconnected(request: Request, answering: Coroutine[Any, Any, _Result]) -> _Result:
    """Return a coroutine's result, or cancel it if the client disconnects before.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    task = asyncio.create_task(answering)
    gone = asyncio.create_task(_disconnection(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        """The body has been read, so nothing else is of interest."""


def _sse(event: BaseModel) -> str:
    return f"data: {json.dumps(_plain(event), ensure_ascii=False)}\n\n"


def _plain(answer: BaseModel) -> dict[str, Any]:
    """Return a response as JSON values, without the fields that are None.

    Two of those stay in every choice, because programs read them without looking for them first.
    """
    values = answer.model_dump(exclude_none=True)
    for choice in values.get("choices", ()):
        choice.setdefault("finish_reason", None)
        choice.setdefault("logprobs", None)
    return values
