"""The generation service: gRPC calls in, the engine's chunks out."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

from cqil_dist.client import CHANNEL_OPTIONS
from cqil_dist.errors import CqilError, RequestError
from cqil_dist.outputs import Status
from cqil_dist.rpc.convert import chunk_to_wire, params_from_wire, status_to_wire
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.rpc.v1 import generation_pb2_grpc as rpc
from cqil_dist.runtime.engine import Engine
from cqil_dist.runtime.request import Request


class GenerationServicer(rpc.GenerationServiceServicer):
    """Answers the calls of protos/cqil_dist/rpc/v1/generation.proto from one engine."""

    def __init__(self, engine: Engine, status: Callable[[], Status]) -> None:
        self._engine = engine
        self._status = status

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        try:
            submitted = self._submit(request)
            # Runs at the end of the call however it ends; cancelling a finished request is free.
            if not context.add_callback(lambda: self._engine.cancel(submitted)):
                self._engine.cancel(submitted)  # the call ended while it was submitted
            for chunk in submitted.stream:
                yield chunk_to_wire(chunk)
        except RequestError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except CqilError as error:
            context.abort(grpc.StatusCode.INTERNAL, str(error))

    def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetStatusResponse:
        return status_to_wire(self._status())

    def _submit(self, request: pb.GenerateRequest) -> Request:
        params = params_from_wire(request.sampling_params)
        rest = (params, request.final_only, request.resume_token_ids)
        kind = request.WhichOneof("prompt")
        if kind == "chat":
            messages = [{"role": m.role, "content": m.content} for m in request.chat.messages]
            return self._engine.submit_chat(messages, *rest)
        if kind == "token_ids":
            return self._engine.submit(list(request.token_ids.ids), *rest)
        return self._engine.submit(request.text, *rest)


class SecretInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls that do not carry the launch's secret."""

    def __init__(self, secret: bytes) -> None:
        self._expected = f"Bearer {secret.hex()}".encode()

        def refuse(request: object, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the call lacks the launch's secret")

        self._refusal = grpc.unary_unary_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        given = dict(details.invocation_metadata).get("authorization", "")
        if hmac.compare_digest(str(given).encode(), self._expected):
            return continuation(details)
        return self._refusal


def start_server(
    servicer: GenerationServicer, host: str, secret: bytes, streams: int
) -> tuple[grpc.Server, str]:
    """Serve on a free port of `host`, up to `streams` calls at a time.

    Returns:
        The started server and its "host:port".
    """
    server = grpc.server(
        futures.ThreadPoolExecutor(streams, thread_name_prefix="grpc"),
        interceptors=[SecretInterceptor(secret)],
        options=CHANNEL_OPTIONS,
        maximum_concurrent_rpcs=streams,
    )
    rpc.add_GenerationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"{host}:0")
    server.start()
    return server, f"{host}:{port}"
