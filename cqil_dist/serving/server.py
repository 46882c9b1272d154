"""The public service from start to end: gRPC and HTTP servers in one event loop."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cqil_dist.client import AsyncClient
from cqil_dist.errors import LaunchError, RankUnavailable
from cqil_dist.rpc.options import OTHER_CALLS
from cqil_dist.serving.admission import Admission
from cqil_dist.serving.backend import Backend
from cqil_dist.serving.grpc_frontend import GrpcServer
from cqil_dist.serving.health import HealthWatch
from cqil_dist.serving.http_app import create_app
from cqil_dist.serving.http_server import HttpServer
from cqil_dist.serving.serve_config import ServeConfig

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = 8
# The engine refuses requests that its queue has no room for. The frontend passes on so many of
# those and refuses the rest itself, so that the coordinator, which takes OTHER_CALLS calls beside
# its requests, always has some left for the frontend's own questions.
_PASSED_ON_BEYOND_QUEUE = OTHER_CALLS // 2
_MOST_OPEN_FILES = 65536


@dataclass(frozen=True)
class Addresses:
    """The addresses of a service: its gRPC port as "host:port", its HTTP port as a URL."""

    grpc: str
    http: str


class Service:
    """The public frontend of a coordinator: its gRPC and HTTP servers, admission and health.

    Args:
        client: a client of the coordinator's own service.
        config: addresses, keys, TLS and limits.
        metrics: returns the cluster's metrics in Prometheus' text format.

    Attributes:
        health: whether requests should be sent here, and if not, why.
    """

    def __init__(
        self,
        client: AsyncClient,
        config: ServeConfig,
        metrics: Callable[[], Awaitable[str]],
    ) -> None:
        self.health = HealthWatch(client, config.recovery_bound_s)
        self._client = client
        self._config = config
        self._metrics = metrics

    @property
    def requests(self) -> int:
        """Return how many requests are being served."""
        return self._admission.in_progress

    async def start(self) -> Addresses:
        """Listen and warm up; health checks report "serving" from the end of the warm-up on.

        Raises:
            LaunchError: a port cannot be bound.
            CqilError: the coordinator does not answer, or its first request fails.
        """
        config = self._config
        models = await self._client.models()
        status = await self._client.status()
        self._admission = Admission(status.slots + status.max_waiting, _PASSED_ON_BEYOND_QUEUE)
        backend = Backend(self._client, models, self._admission, config.request_timeout_s)
        self._grpc = GrpcServer(backend, config)
        self._http = HttpServer(create_app(backend, self.health, config, self._metrics), config.tls)
        sock = config.listen(config.http_port)
        await self._grpc.start()
        self._serving = asyncio.create_task(self._http.serve(sockets=[sock]))
        await _warm_up(backend)
        await self._update_health()
        self._watching = asyncio.create_task(self._watch())
        return Addresses(config.address(self._grpc.port), config.url(sock.getsockname()[1]))

    async def drain(self) -> None:
        """Admit no more requests, let those in progress finish, and abort those that are late."""
        self._admission.draining = True
        await self._grpc.set_serving(False)
        logger.info("ending: running requests have %g s to finish", self._config.drain_timeout_s)
        aborted = await self._admission.drain(self._config.drain_timeout_s, self._client.abort)
        if aborted:
            logger.warning("%d requests were not done and have been handed back", aborted)

    async def stop(self) -> None:
        """Close the servers, and with them the connections of requests still in progress."""
        self._watching.cancel()
        self._http.stop()
        await asyncio.gather(self._serving, self._grpc.stop(), return_exceptions=True)

    async def ended(self) -> None:
        """Wait until the engine has failed for good.

        Raises:
            LaunchError: the HTTP server has ended by itself.
        """
        failed = asyncio.create_task(self.health.failed.wait())
        await asyncio.wait([failed, self._serving], return_when=asyncio.FIRST_COMPLETED)
        if not failed.done():
            failed.cancel()
            raise LaunchError("the HTTP server has ended by itself; the log says more")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.health.INTERVAL_S)
            await self._update_health()

    async def _update_health(self) -> None:
        """Make the gRPC health service report the state of the coordinator."""
        await self.health.look()
        await self._grpc.set_serving(self.health.serving and not self._admission.draining)


async def serve(service: Service, on_ready: Callable[[Addresses], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal skips the rest of draining.

    Args:
        service: a service that has not been started.
        on_ready: called with the service's addresses once it is warm.

    Raises:
        LaunchError: a port cannot be bound.
        RankUnavailable: the engine has given up waiting for a lost rank.
    """
    _allow_many_connections()
    with _signals() as (first, second):
        starting = asyncio.create_task(service.start())
        if not await _first_of(starting, first.wait()):
            return
        on_ready(starting.result())
        if not await _first_of(service.ended(), first.wait()):
            await _first_of(service.drain(), second.wait())
        await service.stop()
    if service.health.failed.is_set():
        raise RankUnavailable(service.health.detail)


async def _first_of(wanted: Awaitable[object], otherwise: Awaitable[object]) -> bool:
    """Wait until one of the two is done, cancel the other, and return whether `wanted` is done."""
    tasks = [asyncio.ensure_future(each) for each in (wanted, otherwise)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()


async def _warm_up(backend: Backend) -> None:
    """Send each model a request, so that memory and code have been touched before users ask."""
    for model in backend.models:
        await backend.client.generate(
            [0] * min(_WARM_UP_TOKENS, model.max_len - 1),
            model=model.name,
            max_tokens=_WARM_UP_TOKENS,
            temperature=0,
            ignore_eos=True,
        )


def _allow_many_connections() -> None:
    """Raise this process's limit of open files as far as the system allows, to 65536 at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


@contextmanager
def _signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Yield two events; the first and the second SIGTERM or SIGINT set them and do nothing else."""
    first, second = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (second if first.is_set() else first).set())
    try:
        yield first, second
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
