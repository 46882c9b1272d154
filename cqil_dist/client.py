"""Talks to a coordinator: requests out, chunks back.

Streams outlive the coordinator: when the connection breaks, the request goes to its successor
together with the tokens that have come, and the stream goes on after them. Knows gRPC and nothing
of Ray, torch or how the answer is computed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Self

import grpc

from cqil_dist.errors import CqilError, RequestError
from cqil_dist.outputs import Chunk, Completion, Status, Timings, TokenLogprob
from cqil_dist.rpc.convert import Prompt, chunk_from_wire, request_to_wire, status_from_wire
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.rpc.v1 import generation_pb2_grpc as rpc
from cqil_dist.sampling_params import SamplingParams

# gRPC's default of 4 MiB is little for a long completion with 20 alternatives a token.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),  # coordinators are cluster addresses, never behind a proxy
    # A coordinator whose node has vanished closes nothing: ask whether it is still there.
    ("grpc.keepalive_time_ms", 3000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),  # what the server puts up with
)
_RETRY_S = 0.2


class GenerationClient:
    """A connection to one launch's generation service.

    Args:
        address: "host:port" of the service.
        secret: the launch's secret.
        locate: asked where the service is when the connection has broken; it may wait, and raises
            CqilError if the service is gone for good. By default it is where it was.
        patience_s: how long a stream tries to go on before it ends with an error.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        locate: Callable[[], str] | None = None,
        patience_s: float = 60.0,
    ) -> None:
        self._metadata = (("authorization", f"Bearer {secret.hex()}"),)
        self._locate = locate or (lambda: address)
        self._patience_s = patience_s
        self._reconnecting = threading.Lock()
        self._closed = False
        self._former: list[_Connection] = []
        self._connection = _Connection(address)

    @property
    def address(self) -> str:
        return self._connection.address

    def stream(
        self, prompt: Prompt, params: SamplingParams, final_only: bool = False
    ) -> Iterator[Chunk]:
        """Chunks as they come. Closing the iterator cancels the request.

        Args:
            final_only: one chunk at the end, with everything in it.

        Raises:
            RequestError: the prompt or a sampling value is wrong.
            CqilError: the engine failed, or cannot be reached.
        """
        params = params.seeded()  # a stream that is resumed draws what it would have drawn
        received = _Received()
        broken_since: float | None = None
        while True:
            connection = self._connection
            request = request_to_wire(prompt, params, final_only, received.token_ids)
            call = self._call(connection, connection.stub.Generate, request)
            try:
                for response in call:
                    broken_since = None
                    yield received.add(chunk_from_wire(response, params.logprobs is not None))
                if not received.finished:
                    raise CqilError(
                        f"the stream from {connection.address} ended before the completion did"
                    )
                return
            except grpc.RpcError as error:
                if received.finished:  # all was said; the call broke while it was being closed
                    return
                broken_since = broken_since or time.monotonic()
                self._reconnect(connection, error, broken_since)
                received.resumed = bool(received.token_ids)
            finally:
                call.cancel()

    def complete(self, prompt: Prompt, params: SamplingParams) -> Completion:
        """The whole completion. Raises as `stream` does."""
        (chunk,) = self.stream(prompt, params, final_only=True)
        assert chunk.result is not None, "the only chunk is the last"
        return chunk.result

    def status(self) -> Status:
        """What is served, by which ranks, and how busy it is. Raises CqilError."""
        broken_since: float | None = None
        while True:
            connection = self._connection
            request = pb.GetStatusRequest()
            try:
                response = self._call(connection, connection.stub.GetStatus, request, timeout=30)
                return status_from_wire(response)
            except grpc.RpcError as error:
                broken_since = broken_since or time.monotonic()
                self._reconnect(connection, error, broken_since)

    def close(self) -> None:
        """Cancel what is running and close the connection."""
        self._closed = True
        for connection in (*self._former, self._connection):
            connection.channel.close()

    def _call(self, connection: _Connection, method: Any, request: Any, **options: Any) -> Any:
        try:
            return method(request, metadata=self._metadata, **options)
        except ValueError as error:
            raise CqilError(f"the connection to {connection.address} is closed") from error

    def _reconnect(self, broken: _Connection, error: Any, since: float) -> None:
        """Find the service again after a call failed; one thread does so for all.

        Args:
            since: when calls began to fail.

        Raises:
            CqilError: the call failed by what it asked; or the service is gone for good, or
                patience has ended.
        """
        if not _is_broken(error):
            raise _translated(error, broken.address) from None
        time.sleep(_RETRY_S)
        with self._reconnecting:
            if self._connection is not broken and not self._closed:
                return  # another thread has found it meanwhile
            if self._closed or time.monotonic() - since > self._patience_s:
                raise _translated(error, broken.address) from None
            if (address := self._locate()) != broken.address:
                # Closed at the end: other streams have yet to notice that it is broken.
                self._former.append(broken)
                self._connection = _Connection(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Connection:
    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.stub = rpc.GenerationServiceStub(self.channel)


@dataclass
class _Received:
    """What has come of one stream, over all its connections.

    Attributes:
        times: when it was begun, then when each token came.
        resumed: it has been broken and taken up again after some tokens.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    times: list[float] = field(default_factory=lambda: [time.monotonic()])
    resumed: bool = False
    finished: bool = False

    def add(self, chunk: Chunk) -> Chunk:
        """Note a chunk; returns it as the stream's reader shall see it."""
        now = time.monotonic()
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs or ()
        self.times += [now] * len(chunk.token_ids)
        self.finished = chunk.result is not None
        if chunk.result is None or not self.resumed:
            return chunk
        return replace(chunk, result=self._whole(chunk.result))

    def _whole(self, result: Completion) -> Completion:
        """The last connection's result, with what only the earlier ones knew."""
        gaps = [1000 * (after - before) for before, after in pairwise(self.times)]
        return replace(
            result,
            logprobs=None if result.logprobs is None else tuple(self.logprobs),
            timings=Timings(gaps[0], tuple(gaps[1:])),
        )


def _is_broken(error: Any) -> bool:
    """Whether a call failed because nobody is there, rather than by what it asked."""
    return bool(error.code() is grpc.StatusCode.UNAVAILABLE)


def _translated(error: Any, address: str) -> CqilError:
    details = error.details()
    if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
        return RequestError(details)
    return CqilError(f"coordinator at {address}: {details} ({error.code().name})")
