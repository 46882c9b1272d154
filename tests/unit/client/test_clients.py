"""The clients by themselves: asyncio, broken streams, and what they go without."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.observed_engine import PLAN, ObservedModel, serving
from helpers.served import PacedModel, Served, served
from helpers.tcp_proxy import TcpProxy, proxy_to
from helpers.tiny_models import TinyModelFactory
from helpers.watching import wait_for

from cqil_dist.client import AsyncClient, Client
from cqil_dist.errors import RequestError, RequestTimeout, ServiceUnavailable
from cqil_dist.outputs import Chunk, TokenLogprob

LONG: dict[str, Any] = {"max_tokens": 50, "temperature": 0, "ignore_eos": True}
# Imports of anything but Python's own modules, this package and its core dependencies fail.
LIGHT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        allowed = {"cqil_dist", "grpc", "google", "typing_extensions"}
        if top not in sys.stdlib_module_names and top not in allowed:
            raise ModuleNotFoundError(f"{name} is not a dependency of a client", name=name)

sys.meta_path.insert(0, Refuse())
from cqil_dist import Client
with Client(sys.argv[1]) as client:
    print(client.generate("The harbour", max_tokens=4, temperature=0, ignore_eos=True).token_ids)
    print(client.models()[0].name, client.status().state)
try:
    import cqil_dist
    cqil_dist.launch("tiny")
except ImportError as error:
    print(error)
"""


@pytest.fixture
def steps(tiny_model: TinyModelFactory) -> PacedModel:
    """As fast as it can be, unless a test sets a pace."""
    return PacedModel(tiny_model(), 2, 0)


@pytest.fixture
def service(tiny_model: TinyModelFactory, steps: ObservedModel) -> Iterator[Served]:
    with serving(tiny_model(), steps, slots=2) as engine, served(engine) as service:
        yield service


def is_idle(service: Served) -> bool:
    status = service.engine.status()
    return status.free_slots == status.slots and not status.waiting_requests


def test_asyncio_gives_what_threads_get(service: Served) -> None:
    async def ask() -> None:
        async with AsyncClient(service.addresses.grpc) as client:
            whole = await client.generate("The harbour", seed=3, max_tokens=12)
            chunks = [
                chunk
                async for chunk in client.generate(
                    "The harbour", seed=3, max_tokens=12, stream=True
                )
            ]
            assert "".join(chunk.text for chunk in chunks) == whole.text == expected.text
            assert whole.token_ids == expected.token_ids
            assert (await client.models())[0].name == "tiny"
            assert (await client.status()).state == "serving"
            together = await asyncio.gather(
                *(client.generate("The harbour", seed=3, max_tokens=12) for _ in range(5))
            )
            assert {completion.token_ids for completion in together} == {expected.token_ids}
            chat = await client.chat([{"role": "user", "content": "hi"}], max_tokens=3, seed=1)
            assert chat.finish_reason in ("length", "stop")
            with pytest.raises(RequestError, match="top_p is 2"):
                await client.generate("x", top_p=2)

    with service.client() as client:
        expected = client.generate("The harbour", seed=3, max_tokens=12)
    asyncio.run(ask())


def test_a_cancelled_task_frees_its_slot(service: Served, steps: ObservedModel) -> None:
    async def ask() -> None:
        async with AsyncClient(service.addresses.grpc) as client:
            asking = asyncio.ensure_future(client.generate("x", **LONG))
            while not service.engine.status().running_requests:
                await asyncio.sleep(0.01)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    with steps.held():
        asyncio.run(asyncio.wait_for(ask(), 30))
    wait_for(lambda: is_idle(service), "the slot is free")


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_stream_goes_on_with_a_successor_where_it_broke(
    tiny_model: TinyModelFactory, service: Served, kind: str, after: int
) -> None:
    """The proxy is cut after this many tokens; another service has the same model."""
    model = tiny_model()
    options: dict[str, Any] = {
        **LONG,
        "temperature": 0.8,
        "seed": 11,
        "logprobs": 1,
        "prompt_logprobs": 0,
    }
    with (
        serving(model, ObservedModel(model, model.plan(PLAN), 2), slots=2) as other,
        served(other) as successor,
        proxy_to(service.addresses.grpc) as proxy,
    ):
        with successor.client() as client:
            expected = client.generate("The harbour", **options)
        if kind == "threads":
            with Client(proxy.address, locate=lambda: successor.addresses.grpc) as client:
                chunks = read_with_a_cut(client, options, after, proxy)
        else:
            chunks = asyncio.run(
                read_with_a_cut_later(proxy, options, after, successor.addresses.grpc)
            )
    assert tuple(id for chunk in chunks for id in chunk.token_ids) == expected.token_ids
    result = chunks[-1].result
    assert result is not None
    assert "".join(chunk.text for chunk in chunks) == result.text == expected.text
    # Computed again in other shapes: equal but for rounding.
    assert logprobs_of(result.logprobs) == pytest.approx(logprobs_of(expected.logprobs), abs=1e-4)
    given = logprobs_of((result.prompt_logprobs or ())[1:])
    assert given == pytest.approx(logprobs_of((expected.prompt_logprobs or ())[1:]), abs=1e-4)
    assert len(result.timings.itl_ms) == len(expected.token_ids) - 1


def logprobs_of(entries: tuple[TokenLogprob, ...] | None) -> list[float]:
    assert entries
    return [entry.logprob for entry in entries if entry.logprob is not None]


def read_with_a_cut(client: Client, options: Any, after: int, proxy: TcpProxy) -> list[Chunk]:
    chunks: list[Chunk] = []
    if not after:
        client.status()  # connected
        proxy.cut()
    for chunk in client.generate("The harbour", **options, stream=True):
        chunks.append(chunk)
        if len(chunks) == after:
            proxy.cut()
    return chunks


async def read_with_a_cut_later(
    proxy: TcpProxy, options: Any, after: int, successor: str
) -> list[Chunk]:
    async def locate() -> str:
        return successor

    chunks: list[Chunk] = []
    async with AsyncClient(proxy.address, locate=locate) as client:
        if not after:
            await client.status()
            proxy.cut()
        async for chunk in client.generate("The harbour", **options, stream=True):
            chunks.append(chunk)
            if len(chunks) == after:
                proxy.cut()
    return chunks


def test_where_nobody_answers_patience_ends(service: Served) -> None:
    with proxy_to(service.addresses.grpc) as proxy:
        address = proxy.address
    with Client(address, patience_s=0.3) as client:
        with pytest.raises(ServiceUnavailable, match=address):
            client.generate("x")
        with pytest.raises(ServiceUnavailable, match=address):
            client.status()


def test_a_timeout_holds_for_all_connections_together(service: Served, steps: PacedModel) -> None:
    """A stream that is taken up again has no more time than it had."""
    steps.pace_s = 0.05  # too slow for all tokens to be out before the steps are held
    with (
        proxy_to(service.addresses.grpc) as proxy,
        Client(proxy.address, locate=lambda: service.addresses.grpc, timeout_s=1.5) as client,
    ):
        stream = client.generate("x", **LONG, stream=True)
        next(stream)
        started = time.monotonic()
        with steps.held():
            proxy.cut()
            with pytest.raises(RequestTimeout):
                list(stream)
        assert time.monotonic() - started < 5
    wait_for(lambda: is_idle(service), "the slot is free")


def test_a_closed_client_says_so(service: Served) -> None:
    client = service.client()
    client.close()
    with pytest.raises(ServiceUnavailable, match="is closed"):
        client.generate("x")


def test_a_client_goes_without_what_only_a_runtime_needs(service: Served) -> None:
    """Installed without extras, it generates; what needs more says what to install."""
    program = [sys.executable, "-c", LIGHT, service.addresses.grpc]
    result = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
    with service.client() as client:
        expected = client.generate("The harbour", max_tokens=4, temperature=0, ignore_eos=True)
    tokens, served_there, refusal = result.stdout.splitlines()
    assert tokens == str(expected.token_ids)
    assert served_there == "tiny serving"
    assert "cqil-dist[runtime]" in refusal
