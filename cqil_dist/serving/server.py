"""A generation service on the network, from warm-up to drained: gRPC and HTTP in one event loop."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
from collections.abc import Awaitable, Callable
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
# Requests on their way to the engine, which refuses what it has no room for. Beyond them the front
# refuses itself, so that its own questions to the coordinator are always answered.
_TO_BE_REFUSED = OTHER_CALLS // 2
_MOST_FILES = 65536


@dataclass(frozen=True)
class Addresses:
    """Where a service can be reached: "host:port", and a URL."""

    grpc: str
    http: str


class Service:
    """The public servers in front of a coordinator.

    Args:
        client: of the coordinator's own service.
        metrics: gives them in Prometheus' text format.

    Attributes:
        health: whether it serves, and if not, why.
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
        """How many are being served."""
        return self._admission.within

    async def start(self) -> Addresses:
        """Listen, warm up, and only then say so.

        Raises:
            LaunchError: a port cannot be had.
            CqilError: the coordinator does not generate.
        """
        config = self._config
        models = await self._client.models()
        status = await self._client.status()
        self._admission = Admission(status.slots + status.max_waiting, _TO_BE_REFUSED)
        backend = Backend(self._client, models, self._admission, config.request_timeout_s)
        self._grpc = GrpcServer(backend, config)
        self._http = HttpServer(create_app(backend, self.health, config, self._metrics), config.tls)
        sock = config.listen(config.http_port)
        await self._grpc.start()
        self._serving = asyncio.create_task(self._http.run_on(sock))
        await _warm_up(backend)
        await self._look()
        self._watching = asyncio.create_task(self._watch())
        return Addresses(config.address(self._grpc.port), config.url(sock.getsockname()[1]))

    async def drain(self) -> None:
        """Let nobody in, have what runs finish, and send away what is late."""
        self._admission.draining = True
        await self._grpc.set_serving(False)
        logger.info("ending: running requests have %g s to finish", self._config.drain_timeout_s)
        sent_away = await self._admission.drain(self._config.drain_timeout_s, self._client.abort)
        if sent_away:
            logger.warning("%d requests were not done and have been handed back", sent_away)

    async def stop(self) -> None:
        """Close the servers; what still runs is cut off."""
        self._watching.cancel()
        self._http.stop()
        await asyncio.gather(self._serving, self._grpc.stop(), return_exceptions=True)

    async def ended(self) -> None:
        """Wait until the engine has given up, or a server has ended by itself.

        Raises:
            LaunchError: the HTTP server has ended.
        """
        failed = asyncio.create_task(self.health.failed.wait())
        await asyncio.wait([failed, self._serving], return_when=asyncio.FIRST_COMPLETED)
        if not failed.done():
            failed.cancel()
            raise LaunchError("the HTTP server has ended by itself; the log says more")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.health.INTERVAL_S)
            await self._look()

    async def _look(self) -> None:
        """Have the health service say what the coordinator does."""
        await self.health.look()
        await self._grpc.set_serving(self.health.serving and not self._admission.draining)


async def serve(service: Service, on_ready: Callable[[Addresses], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is running; a second signal ends at once.

    Raises:
        LaunchError: a port cannot be had.
        RankUnavailable: the engine has given up waiting for a lost rank.
    """
    _allow_many_connections()
    signals = _Signals()
    try:
        starting = asyncio.create_task(service.start())
        if not await _first_of(starting, signals.arrived(1)):
            return
        on_ready(starting.result())
        if not await _first_of(service.ended(), signals.arrived(1)):
            await _first_of(service.drain(), signals.arrived(2))
        await service.stop()
    finally:
        signals.close()
    if service.health.failed.is_set():
        raise RankUnavailable(service.health.detail)


async def _first_of(wanted: Awaitable[object], otherwise: Awaitable[object]) -> bool:
    """Wait for either; whether it was `wanted`. The other is cancelled."""
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
    """The first request touches memory and code that later ones find in place."""
    for model in backend.models:
        await backend.client.generate(
            [0] * min(_WARM_UP_TOKENS, model.max_len - 1),
            model=model.name,
            max_tokens=_WARM_UP_TOKENS,
            temperature=0,
            ignore_eos=True,
        )


def _allow_many_connections() -> None:
    """As many open sockets as the system lets this process have, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


class _Signals:
    """Counts SIGTERM and SIGINT, in place of what they do otherwise."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._note)

    async def arrived(self, count: int) -> None:
        """Wait until so many have come."""
        while self._count < count:
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)

    def _note(self) -> None:
        self._count += 1
        self._changed.set()
