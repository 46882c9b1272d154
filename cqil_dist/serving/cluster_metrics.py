"""This package's metrics from all nodes of the cluster, gathered from Ray's metrics agents."""

from __future__ import annotations

import asyncio
import time

import httpx
import ray

from cqil_dist.errors import ServiceUnavailable
from cqil_dist.launching.in_thread import in_thread

_PREFIX = "ray_cqil_"
_ANSWER_S = 3.0
_FRESH_S = 1.0


class ClusterMetrics:
    """A callable that returns the coordinator's and the ranks' metrics in Prometheus' text format.

    Ray's agent on each node offers the metrics of that node's processes; they lag behind by Ray's
    report interval. An answer is reused for a second, because asking for metrics needs no key.
    """

    def __init__(self) -> None:
        self._gathering: asyncio.Task[str] | None = None
        self._begun = 0.0

    async def __call__(self) -> str:
        """Return metrics of all nodes that answer. Raises ServiceUnavailable without Ray's head."""
        now = time.monotonic()
        if self._gathering is None or (self._gathering.done() and now > self._begun + _FRESH_S):
            self._gathering, self._begun = asyncio.create_task(_gathered()), now
        return await asyncio.shield(self._gathering)


async def _gathered() -> str:
    try:
        async with asyncio.timeout(_ANSWER_S):
            nodes = await in_thread(ray.nodes)
    except TimeoutError:
        raise ServiceUnavailable("Ray's head does not say which nodes there are") from None
    addresses = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in nodes
        if node["Alive"]
    ]
    # All addresses are plain HTTP; without `verify` no certificates are loaded, which takes long.
    async with httpx.AsyncClient(timeout=_ANSWER_S, trust_env=False, verify=False) as client:
        answers = await asyncio.gather(
            *(client.get(address) for address in addresses), return_exceptions=True
        )
    families: dict[str, list[str]] = {}
    for answer in answers:
        if isinstance(answer, httpx.Response) and answer.status_code == httpx.codes.OK:
            _collect(answer.text, families)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def _collect(text: str, families: dict[str, list[str]]) -> None:
    """Add the lines of this package's metric families to those of other nodes.

    A family that several nodes export keeps the HELP and TYPE lines of the first alone.
    """
    name = ""
    known = False
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            known = name in families
        if not name.startswith(_PREFIX):
            continue
        if not (line.startswith("#") and known):
            families.setdefault(name, []).append(line)
