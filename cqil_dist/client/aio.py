"""The client for asyncio programs: the same as `Client`, with coroutines and async iterators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, overload

import grpc
import grpc.aio

from cqil_dist.client.channel import ANSWER_S, Connection, Endpoint
from cqil_dist.client.resuming import Backoff, ResumableStream
from cqil_dist.inputs import Prompt
from cqil_dist.outputs import Chunk, Completion
from cqil_dist.rpc.convert import request_to_wire
from cqil_dist.rpc.convert_status import models_from_wire, status_from_wire
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.status import ModelInfo, Status


class AsyncClient:
    """A connection to a generation service, for one event loop; tasks may share it.

    Arguments and errors are those of `Client`; `locate` is a coroutine function here.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: bool = False,
        ca_cert: str | Path | None = None,
        timeout_s: float | None = None,
        patience_s: float = 10.0,
        locate: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        ca = None if ca_cert is None else Path(ca_cert)
        self._endpoint = Endpoint(address, api_key, tls, ca, direct=locate is not None)
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._locate = locate
        self._reconnecting = asyncio.Lock()
        self._closed = False
        self._connections: list[Connection] = []

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Any
    ) -> Awaitable[Completion]: ...

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Any
    ) -> AsyncIterator[Chunk]: ...

    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Any
    ) -> Awaitable[Completion] | AsyncIterator[Chunk]:
        """Continue a prompt: `await` the completion, or iterate over chunks with `async for`.

        Arguments and errors are those of `Client.generate`. Cancelling the task, or closing the
        iterator, ends the request.
        """
        request = request_to_wire(prompt, final_only=not stream, **options)
        return self.stream(request) if stream else self._complete(request)

    @overload
    def chat(
        self, messages: Sequence[dict[str, str]], *, stream: Literal[False] = False, **options: Any
    ) -> Awaitable[Completion]: ...

    @overload
    def chat(
        self, messages: Sequence[dict[str, str]], *, stream: Literal[True], **options: Any
    ) -> AsyncIterator[Chunk]: ...

    def chat(
        self, messages: Sequence[dict[str, str]], *, stream: Any = False, **options: Any
    ) -> Awaitable[Completion] | AsyncIterator[Chunk]:
        """Answer a conversation, as `Client.chat` does."""
        answer: Awaitable[Completion] | AsyncIterator[Chunk]
        answer = self.generate(messages, stream=stream, **options)
        return answer

    async def stream(
        self,
        request: pb.GenerateRequest,
        timeout_s: float | None = None,
        on_let_in: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Send a request that is in the wire's own form already, and iterate over its chunks.

        Args:
            timeout_s: seconds for all of it; by default the client's timeout.
            on_let_in: awaited once, when the service has found nothing wrong with the request:
                it may still wait there for its turn.
        """
        stream = ResumableStream(request, self._timeout_s if timeout_s is None else timeout_s)
        backoff = Backoff(self._patience_s)
        while not stream.finished:
            connection = self._connection()
            call = connection.call("Generate", stream.next_request(), stream.remaining_s())
            try:
                if on_let_in is not None and connection.let_in(await call.initial_metadata()):
                    await on_let_in()
                    on_let_in = None
                async for response in call:
                    yield stream.take(response)
                stream.check_finished(connection.endpoint.address)
            except grpc.RpcError as error:
                if not stream.finished:  # else all was said, and the call broke while it closed
                    let_in = connection.let_in(await call.initial_metadata())
                    try:
                        async with asyncio.timeout(stream.remaining_s()):
                            await self._reconnect(connection, error, backoff, let_in)
                    except TimeoutError:
                        stream.remaining_s()  # raises
                        raise
            except asyncio.CancelledError:
                if self._closed and not _is_cancelled():  # closing ended the call, nobody the task
                    raise connection.closed() from None
                raise
            finally:
                call.cancel()

    async def abort(self, request_id: str) -> bool:
        """End a request, as `Client.abort` does."""
        request = pb.AbortRequest(request_id=request_id)
        return bool((await self._ask("Abort", request)).aborted)

    async def models(self) -> tuple[ModelInfo, ...]:
        """List what the service offers; requests that name no model get the first."""
        request = pb.GetModelInfoRequest()
        return models_from_wire(await self._ask("GetModelInfo", request))

    async def status(self) -> Status:
        """Ask by which ranks the model is served, and how busy they are."""
        request = pb.GetStatusRequest()
        return status_from_wire(await self._ask("GetStatus", request))

    async def close(self) -> None:
        """Cancel what is running and close the connection."""
        self._closed = True
        for connection in self._connections:
            await connection.channel.close()

    async def _complete(self, request: pb.GenerateRequest) -> Completion:
        completion: Completion | None = None
        async for chunk in self.stream(request):
            completion = chunk.result
        assert completion is not None, "the only chunk is the last"
        return completion

    async def _ask(self, method: str, request: Any) -> Any:
        """Make a call that has a single answer, again and again until the service answers."""
        backoff = Backoff(self._patience_s)
        while True:
            connection = self._connection()
            try:
                return await connection.call(method, request, ANSWER_S)
            except grpc.RpcError as error:
                await self._reconnect(connection, error, backoff)

    def _connection(self) -> Connection:
        """Get the latest connection; the first is made on first use, on the loop that runs then."""
        if not self._connections:
            self._connections.append(Connection(self._endpoint, grpc.aio))
        return self._connections[-1]

    async def _reconnect(
        self, broken: Connection, error: Any, backoff: Backoff, let_in: bool = False
    ) -> None:
        """Find the service again after a call failed, as in `Client`; one task does so for all."""
        wait_s = backoff.next_wait_s(error, let_in, broken.endpoint.address)
        self._check_open(broken)
        await asyncio.sleep(wait_s)
        async with self._reconnecting:
            self._check_open(broken)
            if self._connection() is not broken or self._locate is None:
                return
            if (address := await self._locate()) != broken.endpoint.address:
                # Those before are closed at the end: other streams have yet to notice.
                self._connections.append(Connection(self._endpoint.at(address), grpc.aio))

    def _check_open(self, connection: Connection) -> None:
        if self._closed:
            raise connection.closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
