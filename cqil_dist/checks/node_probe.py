"""What a node can tell of itself and of its links, as a Ray actor: the far end of `cqil doctor`."""

from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from cqil_dist.exchange.link import Link
from cqil_dist.exchange.listener import Listener, connect
from cqil_dist.rank.memory import available_bytes

VERSIONS = ("cqil-dist", "torch", "ray", "transformers")

_FRAME = torch.zeros(576)  # 2.3 kB: a hidden state of a small model
_ROUND_TRIPS = 200
_BULK = torch.zeros(1 << 20)
_BULKS = 8
_DEADLINE_S = 5.0


@dataclass(frozen=True)
class NodeFacts:
    """A node as it sees itself.

    Attributes:
        versions: of Python and of what decides whether nodes understand each other.
        has_model: the model's directory is there.
        free_bytes: memory of the node that can still be taken.
        gpu_free_bytes: of its emptiest GPU; None without one.
        gpus: names of the GPUs torch sees.
        nccl: version, or None where torch has none.
        niceness: of Ray's workers; above 0, they step back behind other processes.
    """

    versions: dict[str, str]
    has_model: bool
    free_bytes: int
    gpu_free_bytes: int | None
    gpus: tuple[str, ...]
    nccl: str | None
    niceness: int


@dataclass(frozen=True)
class LinkSpeed:
    """Between two nodes, over a connection like those between ranks.

    Attributes:
        round_trip_us: median microseconds for a hidden state of 2.3 kB there and back.
        megabytes_per_s: of one connection, in one direction.
    """

    round_trip_us: float
    megabytes_per_s: float


class NodeProbe:
    """One a node. Its methods are called through Ray, from several threads."""

    def __init__(self, host: str, secret: bytes) -> None:
        self._host = host
        self._secret = secret
        self._listener: Listener | None = None

    def facts(self, model_path: Path | None) -> NodeFacts:
        """Versions, model, memory and GPUs."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpu_free = [available_bytes(torch.device("cuda", index)) for index in range(count)]
        nccl: tuple[int, ...] | None = torch.cuda.nccl.version() if count else None  # type: ignore[no-untyped-call]
        return NodeFacts(
            versions={
                "python": platform.python_version(),
                **{name: version(name) for name in VERSIONS},
            },
            has_model=model_path is None or model_path.is_dir(),
            free_bytes=available_bytes(torch.device("cpu")),
            gpu_free_bytes=max(gpu_free, default=None),
            gpus=tuple(torch.cuda.get_device_name(index) for index in range(count)),
            nccl=".".join(map(str, nccl)) if nccl else None,
            niceness=os.nice(0),
        )

    def listen(self) -> str:
        """Open a port on the node's cluster address; returns "host:port". Raises ExchangeError."""
        self._listener = Listener(self._host, self._secret, epoch=0)
        return self._listener.address

    def echo(self, peer: int) -> None:
        """Answer what `peer` sends, until its last message. Raises ExchangeError without one."""
        assert self._listener is not None, "listens first"
        with self._listener as listener:
            sock = listener.accept_peers({peer}, _DEADLINE_S)[peer]
        link = Link(sock, peer, "the prober", _BULK.nbytes, _DEADLINE_S)
        try:
            while True:
                header, _ = link.recv(_DEADLINE_S)
                if header["reply"]:
                    link.send({}, _FRAME)
                if header["end"]:
                    return
        finally:
            link.close()

    def measure(self, own: int, peer: int, address: str) -> LinkSpeed:
        """Time the link to a peer that echoes. Raises ExchangeError."""
        sock = connect(address, own, peer, self._secret, 0, _DEADLINE_S)
        link = Link(sock, peer, address, _BULK.nbytes, _DEADLINE_S)
        try:
            times: list[float] = []
            for _ in range(_ROUND_TRIPS):
                started = time.perf_counter()
                link.send({"reply": True, "end": False}, _FRAME)
                link.recv(_DEADLINE_S)
                times.append(time.perf_counter() - started)
            started = time.perf_counter()
            for index in range(_BULKS):
                last = index == _BULKS - 1
                link.send({"reply": last, "end": last}, _BULK)
            link.recv(_DEADLINE_S)
            seconds = time.perf_counter() - started
        finally:
            link.close()
        return LinkSpeed(1e6 * statistics.median(times), _BULKS * _BULK.nbytes / seconds / 1e6)
