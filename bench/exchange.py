"""Measures one round of the TCP exchange between two processes on this machine, in microseconds.

Each process has a core of its own and does nothing between rounds, so what is measured is the
transfer: no rank waits for another to compute. Run it as `python bench/exchange.py [--json]`.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import secrets
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch

from cqil_dist.assignment import Round
from cqil_dist.exchange import SECRET_BYTES, Listener, TcpExchange, connect_mesh

WARM_UP_ROUNDS = 2000
ROUND = Round(0, ((0, 1), (0, 1)), (1, 1))


@dataclass(frozen=True)
class Timing:
    """The round times of one payload and spin time, in microseconds."""

    payload_bytes: int
    spin_s: float
    rounds: int
    median_us: float
    p10_us: float
    p90_us: float
    p99_us: float


def measure(elements: int, spin_s: float, rounds: int) -> Timing:
    """Time rounds of `elements` float32 each way between two pinned processes."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit(f"needs 2 cores, one for each process; this process may use {cores}")
    spawn = multiprocessing.get_context("spawn")
    secret = secrets.token_bytes(SECRET_BYTES)
    pipes = [spawn.Pipe() for _ in range(2)]
    processes = [
        spawn.Process(
            target=_run_rank, args=(rank, cores[rank], theirs, secret, elements, spin_s, rounds)
        )
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    addresses = {rank: ours.recv() for rank, (ours, _) in enumerate(pipes)}
    for ours, _ in pipes:
        ours.send(addresses)
    durations_us = np.concatenate([ours.recv() for ours, _ in pipes])
    for process in processes:
        process.join()
    percentiles = map(float, np.percentile(durations_us, [50, 10, 90, 99]))
    return Timing(4 * elements, spin_s, rounds, *percentiles)


def _run_rank(
    rank: int,
    core: int,
    pipe: Connection,
    secret: bytes,
    elements: int,
    spin_s: float,
    rounds: int,
) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    with Listener("127.0.0.1", secret, epoch=0) as listener:
        pipe.send(listener.address)
        addresses = pipe.recv()
        peers = connect_mesh(listener, rank, addresses, secret, epoch=0, deadline_s=30.0)
    exchange = TcpExchange(
        rank,
        peers,
        addresses,
        elements,
        torch.float32,
        "cpu",
        max_bytes=4 * elements,
        spin_s=spin_s,
    )
    own = torch.randn(1, elements)
    durations_us = np.zeros(rounds)
    gc.disable()
    with torch.inference_mode():
        for step in range(-WARM_UP_ROUNDS, rounds):
            # Each round is a step of its own: no frame's head can be reused, the worst case.
            exchange.begin_step(step + WARM_UP_ROUNDS, 1)
            started = time.perf_counter()
            exchange.gather(ROUND, own)
            if step >= 0:
                durations_us[step] = (time.perf_counter() - started) * 1e6
    pipe.send(durations_us)
    exchange.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20000)
    parser.add_argument("--json", action="store_true", help="one JSON list, nothing else")
    options = parser.parse_args()
    timings = [
        measure(elements, spin_s, options.rounds)
        for elements in (576, 16384)
        for spin_s in (0.001, 0.0)
    ]
    if options.json:
        print(json.dumps([asdict(timing) for timing in timings], indent=2))
        return
    print("payload bytes  spin us  median us     p10     p90     p99")
    for t in timings:
        print(
            f"{t.payload_bytes:13d}  {t.spin_s * 1e6:7.0f}  {t.median_us:9.1f}"
            f"  {t.p10_us:6.1f}  {t.p90_us:6.1f}  {t.p99_us:6.1f}"
        )


if __name__ == "__main__":
    main()
