"""Serves the engine over gRPC: calls come in, chunks go out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from cqil_dist.engine.engine import Engine
from cqil_dist.engine.request import Request
from cqil_dist.errors import CqilError
from cqil_dist.inputs import GenerationInput
from cqil_dist.outputs import Completion
from cqil_dist.rpc.bearer_key import BearerKey
from cqil_dist.rpc.convert import chunk_to_wire, request_from_wire
from cqil_dist.rpc.convert_status import models_to_wire, status_to_wire
from cqil_dist.rpc.options import KEEPALIVE, LET_IN, LONG_ANSWERS
from cqil_dist.rpc.status_codes import code_of, details_of
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.rpc.v1 import generation_pb2_grpc as rpc
from cqil_dist.status import ModelInfo, Status, find_model


class EngineServicer(rpc.GenerationServiceServicer):
    """Answers the calls of protos/cqil_dist/rpc/v1/generation.proto from one engine.

    Args:
        models: what is offered, in the order of the engine's plans.
        on_completion: told of every completion that was given whole.
    """

    def __init__(
        self,
        engine: Engine,
        models: Sequence[ModelInfo],
        status: Callable[[], Status],
        on_completion: Callable[[Completion], None] = lambda completion: None,
    ) -> None:
        self._engine = engine
        self._models = models
        self._status = status
        self._on_completion = on_completion
        self._lock = threading.Lock()
        self._by_id: dict[str, Request] = {}

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        try:
            given = self._given(request)
            self._end_former(request.request_id)
            submitted = self._engine.submit(given)
            # Runs at the end of the call however it ends; cancelling a finished request is free.
            if not context.add_callback(lambda: self._engine.cancel(submitted)):
                self._engine.cancel(submitted)  # the call ended while it was submitted
            context.send_initial_metadata((LET_IN,))
            with self._named(request.request_id, submitted):
                for chunk in submitted.stream:
                    yield chunk_to_wire(chunk)
                    if chunk.result is not None:
                        self._on_completion(chunk.result)
        except CqilError as error:
            context.abort(code_of(error), details_of(error))

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:
        with self._lock:
            named = self._by_id.get(request.request_id)
        if named is not None:
            self._engine.cancel(named)
        return pb.AbortResponse(aborted=named is not None)

    def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetModelInfoResponse:
        return models_to_wire(self._models)

    def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetStatusResponse:
        return status_to_wire(self._status())

    def _given(self, request: pb.GenerateRequest) -> GenerationInput:
        model = find_model(self._models, request.model)
        plan_index = self._models.index(model)
        return request_from_wire(request, plan_index, model.default_sampling)

    @contextmanager
    def _named(self, request_id: str, request: Request) -> Iterator[None]:
        """Let a request be found by its name while the block runs."""
        with self._lock:
            if request_id:
                self._by_id[request_id] = request
        try:
            yield
        finally:
            with self._lock:
                if self._by_id.get(request_id) is request:
                    del self._by_id[request_id]

    def _end_former(self, request_id: str) -> None:
        """End an earlier request of the same name, if there is one.

        A client that resumes a broken stream comes with the name that the stream had, possibly
        before the end of its old call was noticed.
        """
        with self._lock:
            former = self._by_id.pop(request_id, None)
        if former is not None:
            self._engine.cancel(former)


class KeyInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls that do not carry the key."""

    def __init__(self, key: str) -> None:
        self._key = BearerKey(key)

        def refuse(request: object, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the call lacks the launch's secret")

        self._refusal = grpc.unary_unary_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        given = dict(details.invocation_metadata).get("authorization", "")
        if self._key.admits(given):
            return continuation(details)
        return self._refusal


def start_server(
    servicer: EngineServicer, host: str, key: str, streams: int
) -> tuple[grpc.Server, str]:
    """Serve on a free port of `host`, up to `streams` calls at a time.

    Returns:
        The started server and its "host:port".
    """
    server = grpc.server(
        futures.ThreadPoolExecutor(streams, thread_name_prefix="grpc"),
        interceptors=[KeyInterceptor(key)],
        options=KEEPALIVE + LONG_ANSWERS,
        maximum_concurrent_rpcs=streams,
    )
    rpc.add_GenerationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"{host}:0")
    server.start()
    return server, f"{host}:{port}"
