"""The public gRPC service, which passes calls on to the coordinator, wherever that runs now."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cqil_dist.errors import CqilError, LaunchError
from cqil_dist.rpc.bearer_key import BearerKey
from cqil_dist.rpc.convert import chunk_to_wire
from cqil_dist.rpc.convert_status import models_to_wire, status_to_wire
from cqil_dist.rpc.options import KEEPALIVE, LET_IN, receiving_up_to
from cqil_dist.rpc.status_codes import code_of, details_of
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.rpc.v1 import generation_pb2_grpc as rpc
from cqil_dist.serving.backend import Backend
from cqil_dist.serving.serve_config import ServeConfig

GENERATION_SERVICE: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
"""The service's full name, by which health checks and reflection know it."""

_HEALTH = f"/{health.SERVICE_NAME}/"
_END_S = 2.0
_MOST_WATCHING = 64


class FrontendServicer(rpc.GenerationServiceServicer):
    """The servicer of protos/cqil_dist/rpc/v1/generation.proto, which asks the coordinator."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        async with _errors_as_codes(context):

            async def let_in() -> None:
                await context.send_initial_metadata((LET_IN,))

            stream = self._backend.stream(request, let_in, context.time_remaining())
            with _time_limit(self._backend.longest_s, context):
                async with aclosing(stream) as chunks:
                    async for chunk in chunks:
                        yield chunk_to_wire(chunk)

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        async with _errors_as_codes(context):
            return pb.AbortResponse(aborted=await self._backend.client.abort(request.request_id))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        return models_to_wire(self._backend.models)

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetStatusResponse:
        async with _errors_as_codes(context):
            return status_to_wire(await self._backend.status())


@contextmanager
def _time_limit(seconds: float, context: grpc.aio.ServicerContext) -> Iterator[None]:
    """Abort the call after so many seconds, even while its client does not read the answer."""
    answering = asyncio.current_task()
    assert answering is not None, "calls are answered in tasks"
    expired = False

    async def expire() -> None:
        nonlocal expired
        await asyncio.sleep(seconds)
        expired = True
        answering.cancel()
        message = f"the answer was not read within {seconds:g} s"
        with suppress(Exception):  # abort always raises: to end the call, or because it has ended
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, message)

    timer = asyncio.create_task(expire())
    try:
        yield
    finally:
        if not expired:
            timer.cancel()


@asynccontextmanager
async def _errors_as_codes(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    try:
        yield
    except CqilError as error:
        await context.abort(code_of(error), details_of(error))


class _RequireKey(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """An interceptor that refuses calls without the service's key, except for health checks."""

    def __init__(self, key: str) -> None:
        self._key = BearerKey(key)

        async def refuse(requests: object, context: grpc.aio.ServicerContext) -> None:
            message = "give the service's key as the metadata 'authorization: Bearer <key>'"
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

        # A handler of request streams can refuse before any request has arrived.
        self._refusal = grpc.stream_unary_rpc_method_handler(refuse)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        given = dict(details.invocation_metadata).get("authorization", "")
        if self._key.admits(given) or details.method.startswith(_HEALTH):
            return await continuation(details)
        return self._refusal


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """The health service, with a limit on Watch calls, which last and need no key."""

    def __init__(self) -> None:
        super().__init__()
        self._watching = 0

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        if self._watching >= _MOST_WATCHING:
            message = f"{_MOST_WATCHING} Watch calls are open, as many as may be; use Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._watching += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watching -= 1


class GrpcServer:
    """The public gRPC server, with the generation service, health checks and reflection.

    Attributes:
        port: the port that it is bound to.

    Raises:
        LaunchError: the port cannot be bound.
    """

    def __init__(self, backend: Backend, config: ServeConfig) -> None:
        self._health = _Health()
        self._server = grpc.aio.server(
            interceptors=[] if config.api_key is None else [_RequireKey(config.api_key)],
            options=(
                *KEEPALIVE,
                *receiving_up_to(config.max_body_bytes),
                ("grpc.so_reuseport", 0),  # else a second service could bind the same port
            ),
        )
        rpc.add_GenerationServiceServicer_to_server(FrontendServicer(backend), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (GENERATION_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = self._bind(config)

    async def start(self) -> None:
        """Answer calls, and report NOT_SERVING to health checks until told otherwise."""
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """Make the health service report SERVING or NOT_SERVING."""
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if serving else states.NOT_SERVING
        for name in ("", GENERATION_SERVICE):
            await self._health.set(name, state)

    async def stop(self) -> None:
        """Refuse new calls at once, and cut off the others after 2 s."""
        await self._server.stop(_END_S)

    def _bind(self, config: ServeConfig) -> int:
        address = config.address(config.grpc_port)
        try:
            if (tls := config.tls) is None:
                return int(self._server.add_insecure_port(address))
            return int(
                self._server.add_secure_port(address, grpc.ssl_server_credentials([tls.pair()]))
            )
        except RuntimeError as error:
            raise LaunchError(f"cannot serve at {address}: {error}; is the port taken?") from (
                error
            )
