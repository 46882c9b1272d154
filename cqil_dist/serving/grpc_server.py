"""The generation service: gRPC calls in, the engine's chunks out."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc

from cqil_dist.client import CHANNEL_OPTIONS
from cqil_dist.errors import CqilError, RequestError
from cqil_dist.plan import Plan
from cqil_dist.rpc.convert import chunk_to_wire, params_from_wire
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.rpc.v1 import generation_pb2_grpc as rpc
from cqil_dist.runtime.engine import Engine
from cqil_dist.runtime.request import Request


@dataclass(frozen=True)
class Served:
    """What a coordinator serves, for its status.

    Attributes:
        steps: says how many steps were computed since launch.
    """

    model: str
    plan: Plan
    ranks: tuple[pb.RankStatus, ...]
    steps: Callable[[], int]


class GenerationServicer(rpc.GenerationServiceServicer):
    """Answers the calls of protos/cqil_dist/rpc/v1/generation.proto from one engine."""

    def __init__(self, engine: Engine, served: Served) -> None:
        self._engine = engine
        self._served = served

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        try:
            submitted = self._submit(request)
            # Runs at the end of the call however it ends; cancelling a finished request is free.
            context.add_callback(lambda: self._engine.cancel(submitted))
            for chunk in submitted.stream:
                yield chunk_to_wire(chunk)
        except RequestError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except CqilError as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(
            model=self._served.model,
            plan_json=json.dumps(self._served.plan.to_json()),
            ranks=self._served.ranks,
            max_len=self._engine.max_len,
            steps=self._served.steps(),
            **self._engine.status(),
        )

    def _submit(self, request: pb.GenerateRequest) -> Request:
        params = params_from_wire(request.sampling_params)
        kind = request.WhichOneof("prompt")
        if kind == "chat":
            messages = [{"role": m.role, "content": m.content} for m in request.chat.messages]
            return self._engine.submit_chat(messages, params, request.final_only)
        if kind == "token_ids":
            return self._engine.submit(list(request.token_ids.ids), params, request.final_only)
        return self._engine.submit(request.text, params, request.final_only)


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


def rank_statuses(descriptions: Sequence[dict[str, Any]]) -> tuple[pb.RankStatus, ...]:
    """Wire form of `LayerActor.describe` of every rank."""
    return tuple(pb.RankStatus(**description) for description in descriptions)
