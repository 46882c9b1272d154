"""The torch.distributed exchange over gloo, one process per rank: the code that runs NCCL too."""

from __future__ import annotations

import multiprocessing
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from cqil_dist.assignment import Round
from cqil_dist.errors import ExchangeError
from cqil_dist.exchange import TorchDistributedExchange

WIDTH = 64


def free_address() -> str:
    """An address whose port is still free when the ranks have loaded torch and listen at it.

    The kernel chooses ports from 32768 on, and Ray those from 10002 to 19999 for its workers.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return f"127.0.0.1:{port}"


def run(world: int, body: Callable[[int, int, str], Any]) -> list[Any]:
    """The results of `body(rank, world, init_address)`, run in a process for each rank."""
    address = free_address()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(world, spawn, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(body, rank, world, address) for rank in range(world)]
        return [future.result(timeout=90) for future in futures]


def join(rank: int, world: int, address: str, **options: Any) -> TorchDistributedExchange:
    settings: dict[str, Any] = {
        "width": WIDTH,
        "dtype": torch.float32,
        "device": "cpu",
        **options,
    }
    return TorchDistributedExchange(rank, world, "gloo", address, **settings)


def part(source: int, step: int, tensors: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + source)
    return torch.randn(tensors, 2, WIDTH, generator=generator)


def walk(rank: int, world: int, address: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Walk steps with a symmetric round, a bypass round, a hand-over and one of unequal shapes."""
    everyone = tuple(range(world))
    unequal = tuple(1 + source for source in everyone)
    rounds = [
        Round(0, (everyone,) * world, (1,) * world),
        Round(1, tuple(everyone[max(0, r - 1) : r + 1] for r in everyone), unequal),
        Round(2, ((), (0,), *[()] * (world - 2)), (1, *[0] * (world - 1))),
        Round(3, (everyone,) * world, unequal),
    ]
    exchange = join(rank, world, address)
    sums = []
    with torch.inference_mode():
        for step in range(4):
            exchange.begin_step(step, 2)
            for each in rounds:
                contributes = any(rank in wanted for wanted in each.sources)
                own = part(rank, step, each.tensor_counts[rank]) if contributes else None
                gathered = exchange.gather(each, own)
                wanted = [part(r, step, each.tensor_counts[r]) for r in each.sources[rank]]
                if wanted:
                    assert gathered is not None
                    assert torch.equal(gathered, torch.cat(wanted)), each
                else:
                    assert gathered is None
            total = exchange.sum(replace(rounds[0], index=4), part(rank, step, 1)[0])
            assert total is not None
            sums.append(total)
    stats = exchange.stats.snapshot()
    exchange.close()
    exchange.close()
    with pytest.raises(ExchangeError, match=f"rank {rank} has closed"):
        exchange.gather(rounds[0], sums[0])
    return sums, stats


@pytest.mark.parametrize("world", [2, 3])
def test_rounds_of_every_kind(world: int) -> None:
    (first, _), *others = results = run(world, walk)
    for sums, _ in others:
        assert all(torch.equal(a, b) for a, b in zip(first, sums, strict=True))
    stats = [snapshot for _, snapshot in results]
    assert [s["rounds_led"] for s in stats] == [20] + [0] * (world - 1)
    assert [s["rounds"] for s in stats] == [20, 20, 16][:world]
    waits = [[0, 3, 4] * 4, [0, 1, 2, 3, 4] * 4, [0, 1, 3, 4] * 4]
    assert [s["round"] for s in stats] == waits[:world]
    row = 2 * WIDTH * 4
    assert stats[0]["bytes_sent"] == 4 * row * ((world - 1) + 1 + 1 + 2 * (world - 1))
    unequal = {2: 1, 3: 1 + 3}[world]  # rows that ranks 0 and 2 send rank 1 in the last round
    assert stats[1]["bytes_received"] == 4 * row * (2 * (world - 1) + 1 + 1 + unequal)


def lose_rank_1(rank: int, world: int, address: str) -> float:
    exchange = join(rank, world, address, deadline_s=20.0)
    both = Round(0, ((0, 1), (0, 1)), (1, 1))
    exchange.begin_step(5, 1)
    exchange.gather(both, torch.zeros(1, WIDTH))
    if rank == 1:
        exchange.close()
        return 0.0
    started = time.monotonic()
    with pytest.raises(ExchangeError, match="step 5, round 0 failed in gloo"):
        exchange.gather(both, torch.zeros(1, WIDTH))
    exchange.close()
    return time.monotonic() - started


def test_a_lost_peer_ends_the_gather() -> None:
    assert max(run(2, lose_rank_1)) < 5


def test_a_group_that_does_not_form_is_an_error() -> None:
    address = free_address()
    with pytest.raises(ExchangeError, match=f"rank 0 of 2 could not join .* {address}"):
        join(0, 2, address, deadline_s=1.0)
