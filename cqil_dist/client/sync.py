"""The client for ordinary programs, which may have threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, overload

import grpc

from cqil_dist.client.channel import ANSWER_S, Connection, Endpoint
from cqil_dist.client.resuming import Backoff, ResumableStream
from cqil_dist.inputs import Prompt
from cqil_dist.outputs import Chunk, Completion
from cqil_dist.rpc.convert import request_to_wire
from cqil_dist.rpc.convert_status import models_from_wire, status_from_wire
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.status import ModelInfo, Status


class Client:
    """A connection to a generation service; threads may share it.

    Args:
        address: "host:port" of the service's gRPC port.
        api_key: the service's key, where it has one.
        tls: whether the connection is encrypted.
        ca_cert: certificates to check the server's against; None takes the system's.
        timeout_s: seconds for each request; None sets no limit.
        patience_s: how long a call tries to reach a service that does not answer. A stream that
            breaks goes on after its last token, with none lost or doubled.
        locate: asked where the service is when the connection has broken; it may wait, and raises
            CqilError if the service is gone for good. By default it is where it was.
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
        locate: Callable[[], str] | None = None,
    ) -> None:
        ca = None if ca_cert is None else Path(ca_cert)
        endpoint = Endpoint(address, api_key, tls, ca, direct=locate is not None)
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._locate = locate
        self._reconnecting = threading.Lock()
        self._closed = False
        self._connections = [Connection(endpoint, grpc)]

    @property
    def address(self) -> str:
        """Return the address, "host:port", at which the service was found last."""
        return self._connections[-1].endpoint.address

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Any
    ) -> Iterator[Chunk]: ...

    def generate(
        self,
        prompt: Prompt,
        *,
        stream: bool = False,
        model: str = "",
        request_id: str = "",
        echo: bool = False,
        timeline: bool = False,
        **sampling: Any,
    ) -> Completion | Iterator[Chunk]:
        """Continue a prompt.

        Args:
            prompt: text, token ids, or chat messages with "role" and "content".
            stream: give chunks as they come. Closing the iterator ends the request.
            model: one of `models()`; the first where empty.
            request_id: names the request in `abort` and in the service's logs.
            echo: the completion brings the prompt's text.
            timeline: chunks bring the timelines of their steps.
            **sampling: the fields of `SamplingParams`; those left out take the model's defaults.

        Raises:
            RequestError: the prompt or a sampling value is wrong.
            ModelNotFound: the service has no such model.
            ServiceError: the service does not answer: nobody there, too busy, too late, or the key
                is wrong.
            CqilError: the engine failed.
        """
        request = request_to_wire(
            prompt,
            final_only=not stream,
            model=model,
            request_id=request_id,
            echo=echo,
            timeline=timeline,
            **sampling,
        )
        chunks = self._stream(ResumableStream(request, self._timeout_s))
        if stream:
            return chunks
        (chunk,) = chunks
        assert chunk.result is not None, "the only chunk is the last"
        return chunk.result

    @overload
    def chat(
        self, messages: Sequence[dict[str, str]], *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...

    @overload
    def chat(
        self, messages: Sequence[dict[str, str]], *, stream: Literal[True], **options: Any
    ) -> Iterator[Chunk]: ...

    def chat(
        self, messages: Sequence[dict[str, str]], *, stream: Any = False, **options: Any
    ) -> Completion | Iterator[Chunk]:
        """Answer a conversation as `generate` would, laid out by the model's chat template.

        Args:
            messages: each with "role" ("system", "user" or "assistant") and "content".
        """
        answer: Completion | Iterator[Chunk] = self.generate(messages, stream=stream, **options)
        return answer

    def abort(self, request_id: str) -> bool:
        """End a request: its stream closes as "abort". Returns whether there was one."""
        request = pb.AbortRequest(request_id=request_id)
        return bool(self._ask("Abort", request).aborted)

    def models(self) -> tuple[ModelInfo, ...]:
        """List what the service offers; requests that name no model get the first."""
        request = pb.GetModelInfoRequest()
        return models_from_wire(self._ask("GetModelInfo", request))

    def status(self) -> Status:
        """Ask by which ranks the model is served, and how busy they are."""
        request = pb.GetStatusRequest()
        return status_from_wire(self._ask("GetStatus", request))

    def close(self) -> None:
        """Cancel what is running and close the connection."""
        self._closed = True
        for connection in self._connections:
            connection.channel.close()

    def _stream(self, stream: ResumableStream) -> Iterator[Chunk]:
        backoff = Backoff(self._patience_s)
        while not stream.finished:
            connection = self._connections[-1]
            call = connection.call("Generate", stream.next_request(), stream.remaining_s())
            try:
                for response in call:
                    yield stream.take(response)
                stream.check_finished(connection.endpoint.address)
            except grpc.RpcError as error:
                if not stream.finished:  # else all was said, and the call broke while it closed
                    let_in = connection.let_in(call.initial_metadata())
                    self._reconnect(connection, error, backoff, let_in)
            finally:
                call.cancel()

    def _ask(self, method: str, request: Any) -> Any:
        """Make a call that has a single answer, again and again until the service answers."""
        backoff = Backoff(self._patience_s)
        while True:
            connection = self._connections[-1]
            try:
                return connection.call(method, request, ANSWER_S)
            except grpc.RpcError as error:
                self._reconnect(connection, error, backoff)

    def _reconnect(
        self, broken: Connection, error: Any, backoff: Backoff, let_in: bool = False
    ) -> None:
        """Find the service again after a call failed; one thread does so for all.

        Raises:
            CqilError: what the call asked was refused, the service is gone for good, or patience
                has ended.
        """
        wait_s = backoff.next_wait_s(error, let_in, broken.endpoint.address)
        self._check_open(broken)
        time.sleep(wait_s)
        with self._reconnecting:
            self._check_open(broken)
            if self._connections[-1] is not broken or self._locate is None:
                return  # another thread has found it meanwhile; or it is where it was
            if (address := self._locate()) != broken.endpoint.address:
                # Those before are closed at the end: other streams have yet to notice.
                self._connections.append(Connection(broken.endpoint.at(address), grpc))

    def _check_open(self, connection: Connection) -> None:
        if self._closed:
            raise connection.closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
