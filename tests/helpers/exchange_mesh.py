"""Real meshes of exchanges on loopback, and threads that stand for ranks."""

from __future__ import annotations

import gc
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from cqil_dist.assignment import Round
from cqil_dist.exchange import SECRET_BYTES, Listener, TcpExchange, connect_mesh

T = TypeVar("T")

SECRET = secrets.token_bytes(SECRET_BYTES)


def everyone(world: int, index: int = 0) -> Round:
    """A round in which every rank needs every rank's part, one tensor each."""
    return Round(index, tuple(tuple(range(world)) for _ in range(world)), (1,) * world)


def in_threads(*bodies: Callable[[], T]) -> list[T]:
    """Run functions at the same time; return their results, or raise the first error, in order."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        futures: list[Future[T]] = [pool.submit(body) for body in bodies]
        return [future.result() for future in futures]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def descriptors_at_first() -> int:
    """Count descriptors after collecting garbage, lest earlier tests' be closed during this one."""
    gc.collect()
    return open_descriptors()


@contextmanager
def tcp_mesh(world: int, **options: Any) -> Iterator[list[TcpExchange]]:
    """Connect one TcpExchange for each rank."""
    settings: dict[str, Any] = {
        "width": 576,
        "dtype": torch.float32,
        "device": "cpu",
        "max_bytes": 1 << 24,
        "deadline_s": 10.0,
        **options,
    }
    listeners = [Listener("127.0.0.1", SECRET, epoch=0) for _ in range(world)]
    addresses = {rank: listener.address for rank, listener in enumerate(listeners)}

    def join(rank: int) -> TcpExchange:
        peers = connect_mesh(listeners[rank], rank, addresses, SECRET, epoch=0, deadline_s=10.0)
        return TcpExchange(rank, peers, addresses, **settings)

    exchanges = in_threads(*(lambda rank=rank: join(rank) for rank in range(world)))
    for listener in listeners:
        listener.close()
    try:
        yield exchanges
    finally:
        for exchange in exchanges:
            exchange.close()


@contextmanager
def socket_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Open a TCP connection, and give both its ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, far
