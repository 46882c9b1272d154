"""A Ray actor for `cqil doctor` that reports on its node and measures links to other nodes."""

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
    """The facts of a node that decide whether a launch works there.

    Attributes:
        versions: the versions of Python and of the packages that have to be the same on all nodes.
        has_model: whether the model's directory is there; true if no model was asked for.
        free_bytes: bytes of memory that are available on the node.
        gpu_free_bytes: bytes available on the emptiest GPU; None without a GPU.
        gpus: names of the GPUs that torch sees.
        nccl: NCCL's version; None if torch sees no GPU.
        niceness: niceness of Ray's workers; above 0, other processes are scheduled before them.
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
    """The speed of a connection between two nodes like those between ranks.

    Attributes:
        round_trip_us: median microseconds for a hidden state of 2.3 kB there and back.
        megabytes_per_s: bandwidth of the one connection in one direction.
    """

    round_trip_us: float
    megabytes_per_s: float


class NodeProbe:
    """A probe of one node, whose methods are called through Ray from several threads."""

    def __init__(self, host: str, secret: bytes) -> None:
        self._host = host
        self._secret = secret
        self._listener: Listener | None = None

    def facts(self, model_path: Path | None) -> NodeFacts:
        """Report the node's versions, model, memory and GPUs."""
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
        """Listen on the node's cluster address, and return "host:port". Raises ExchangeError."""
        self._listener = Listener(self._host, self._secret, epoch=0)
        return self._listener.address

    def echo(self, peer: int) -> None:
        """Answer `peer` until its last message. Raises ExchangeError if that does not come."""
        assert self._listener is not None, "listen is called before echo"
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
        """Measure the link to a peer that echoes. Raises ExchangeError if the link fails."""
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
