"""A whole service over one engine in this process: the public servers, real sockets, no Ray."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from helpers.observed_engine import PLAN, ObservedModel
from helpers.tiny_models import TinyModel
from torch import Tensor

from cqil_dist.client import AsyncClient, Client
from cqil_dist.coordinator.service import EngineServicer, start_server
from cqil_dist.engine.engine import Engine
from cqil_dist.model.step import Step
from cqil_dist.serving.serve_config import ServeConfig
from cqil_dist.serving.server import Addresses, Service
from cqil_dist.status import ModelInfo, RankStatus, Status

MODEL = "tiny"
_Result = TypeVar("_Result")


@dataclass
class Served:
    """A service that runs on an event loop of its own."""

    engine: Engine
    service: Service
    addresses: Addresses
    loop: asyncio.AbstractEventLoop
    api_key: str | None

    def run(self, work: Coroutine[Any, Any, _Result], timeout_s: float = 60) -> _Result:
        """Run a coroutine on the service's event loop, and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def client(self, **options: Any) -> Client:
        return Client(self.addresses.grpc, **{"api_key": self.api_key, **options})

    def free_slots(self) -> int:
        return self.engine.status().free_slots

    @property
    def slots(self) -> int:
        return self.engine.status().slots

    @property
    def idle(self) -> bool:
        """Whether the service has no request: none in progress, none waiting, every slot free."""
        status = self.engine.status()
        is_free = status.free_slots == status.slots
        return is_free and not status.waiting_requests and not self.service.requests


class PacedModel(ObservedModel):
    """A model that takes a while for each step, so that requests stay in progress."""

    def __init__(self, model: TinyModel, slots: int, pace_s: float) -> None:
        super().__init__(model, model.plan(PLAN), slots)
        self.pace_s = pace_s

    def compute(self, step: Step) -> Tensor:
        time.sleep(self.pace_s)
        return super().compute(step)


def model_infos(engine: Engine, names: Sequence[str], **values: Any) -> list[ModelInfo]:
    info: dict[str, Any] = {
        "plan": {"num_layers": 6, "groups": [{"layers": [i], "bypass": 0} for i in range(6)]},
        "exchanges_per_token": 0,
        "max_len": engine.max_len,
        "vocab_size": 307,
        "dtype": "float32",
        "default_sampling": {},
        "has_chat_template": True,
        "created": 1,
        **values,
    }
    return [ModelInfo(name=name, **info) for name in names]


@contextmanager
def coordinated(
    engine: Engine, names: Sequence[str] = (MODEL,), **info: Any
) -> Iterator[tuple[str, str]]:
    """Start the coordinator's own service over an engine; gives its address and key."""
    models = model_infos(engine, names, **info)

    def status() -> Status:
        rank = RankStatus(0, "node", "127.0.0.1", 1, "cpu", 1, 1)
        return Status(
            model=names[0],
            plan=models[0].plan,
            ranks=(rank,),
            max_len=engine.max_len,
            epoch=0,
            ready_spares=0,
            **vars(engine.status()),
        )

    key = secrets.token_hex(8)
    server, address = start_server(EngineServicer(engine, models, status), "127.0.0.1", key, 64)
    try:
        yield address, key
    finally:
        server.stop(grace=None).wait()


@contextmanager
def served(
    engine: Engine, names: Sequence[str] = (MODEL,), info: Any = None, **config: Any
) -> Iterator[Served]:
    """Start a service over an engine, with these fields of `ServeConfig`."""
    settings = ServeConfig(**{"grpc_port": 0, "http_port": 0, **config})
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="service", daemon=True)
    thread.start()

    async def no_metrics() -> str:
        return ""

    async def begin(address: str, key: str) -> tuple[AsyncClient, Service, Addresses]:
        client = AsyncClient(address, api_key=key)
        service = Service(client, settings, no_metrics)
        return client, service, await service.start()

    async def end(client: AsyncClient, service: Service) -> None:
        await service.stop()
        await client.close()

    with coordinated(engine, names, **(info or {})) as (address, key):
        starting = asyncio.run_coroutine_threadsafe(begin(address, key), loop)
        client, service, addresses = starting.result(60)
        try:
            yield Served(engine, service, addresses, loop, settings.api_key)
        finally:
            asyncio.run_coroutine_threadsafe(end(client, service), loop).result(60)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()
