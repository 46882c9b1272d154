"""The torch.distributed exchange over gloo, one process per rank: the code that runs NCCL too."""

from __future__ import annotations

import multiprocessing
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch

from cqil_dist.assignment import Round
from cqil_dist.errors import ExchangeError
from cqil_dist.exchange import TorchDistributedExchange, sum_in_rank_order

WIDTH = 64


def free_address() -> str:
    """With a port that nobody is given before the ranks have loaded torch and listen at it: none
    that the kernel chooses (32768 and up), or Ray for its workers (10002 to 19999)."""
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return f"127.0.0.1:{port}"


def run(world: int, body: Callable[[int, int, str], Any]) -> list[Any]:
    """`body(rank, world, init_address)` in a process of its own for each rank."""
    address = free_address()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(world, spawn, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(body, rank, world, address) for rank in range(world)]
        return [future.result(timeout=90) for future in futures]


def join(rank: int, world: int, address: str, **options: Any) -> TorchDistributedExchange:
    settings: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", **options}
    return TorchDistributedExchange(rank, world, "gloo", address, **settings)


def part(source: int, step: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + source))


def walk(rank: int, world: int, address: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Steps of a symmetric round, a bypass round, a hand-over, and one of unequal shapes."""
    everyone = tuple(range(world))
    rounds: list[tuple[Round, list[tuple[int, ...]]]] = [
        (Round(0, (everyone,) * world), [(2, WIDTH)] * world),
        (
            Round(1, tuple(everyone[max(0, r - 1) : r + 1] for r in everyone)),
            [(1 + source, 2, WIDTH) for source in everyone],
        ),
        (Round(2, ((), (0,), *[()] * (world - 2))), [(2, WIDTH)] * world),
        (Round(3, (everyone,) * world), [(1 + source, 2, WIDTH) for source in everyone]),
    ]
    exchange = join(rank, world, address)
    sums = []
    with torch.inference_mode():
        for step in range(4):
            exchange.begin_step(step)
            for round, shape in rounds:
                contributes = any(rank in wanted for wanted in round.sources)
                own = part(rank, step, *shape[rank]) if contributes else None
                gathered = exchange.gather(round, own, dict(enumerate(shape)))
                assert tuple(source for source, _ in gathered) == round.sources[rank]
                for source, tensor in gathered:
                    assert torch.equal(tensor, part(source, step, *shape[source])), (round, source)
                    assert source != rank or tensor is own
                if round.index == 0:
                    sums.append(sum_in_rank_order(gathered))
    stats = exchange.stats.snapshot()
    exchange.close()
    exchange.close()
    with pytest.raises(ExchangeError, match=f"rank {rank} has closed"):
        exchange.gather(rounds[0][0], sums[0], dict(enumerate(rounds[0][1])))
    return sums, stats


@pytest.mark.parametrize("world", [2, 3])
def test_rounds_of_every_kind(world: int) -> None:
    (first, _), *others = results = run(world, walk)
    for sums, _ in others:
        assert all(torch.equal(a, b) for a, b in zip(first, sums, strict=True))
    stats = [snapshot for _, snapshot in results]
    assert [s["rounds_led"] for s in stats] == [16] + [0] * (world - 1)
    assert [s["rounds"] for s in stats] == [16, 16, 12][:world]
    assert [s["round"] for s in stats] == [[0, 3] * 4, [0, 1, 2, 3] * 4, [0, 1, 3] * 4][:world]
    row = 2 * WIDTH * 4
    assert stats[0]["bytes_sent"] == 4 * row * ((world - 1) + 1 + 1 + (world - 1))
    unequal = {2: 1, 3: 1 + 3}[world]  # rows that ranks 0 and 2 send rank 1 in the last round
    assert stats[1]["bytes_received"] == 4 * row * ((world - 1) + 1 + 1 + unequal)


def lose_rank_1(rank: int, world: int, address: str) -> float:
    exchange = join(rank, world, address, deadline_s=20.0)
    round = Round(0, ((0, 1), (0, 1)))
    shapes = {0: (WIDTH,), 1: (WIDTH,)}
    exchange.begin_step(5)
    exchange.gather(round, torch.zeros(WIDTH), shapes)
    if rank == 1:
        exchange.close()
        return 0.0
    started = time.monotonic()
    with pytest.raises(ExchangeError, match="step 5, round 0 failed in gloo"):
        exchange.gather(round, torch.zeros(WIDTH), shapes)
    exchange.close()
    return time.monotonic() - started


def test_a_lost_peer_ends_the_gather() -> None:
    assert max(run(2, lose_rank_1)) < 5


def test_a_group_that_does_not_form_is_an_error() -> None:
    address = free_address()
    with pytest.raises(ExchangeError, match=f"rank 0 of 2 could not join .* {address}"):
        join(0, 2, address, deadline_s=1.0)
