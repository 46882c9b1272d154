"""Our metrics, of all nodes: gathered from where Ray exports them."""

from __future__ import annotations

import asyncio

import httpx
import ray

from cqil_dist.errors import ServiceUnavailable
from cqil_dist.in_thread import in_thread

_PREFIX = "ray_cqil_"
_ANSWER_S = 3.0


async def cluster_metrics() -> str:
    """What the coordinator and the ranks export, in Prometheus' text format.

    Ray's agent on each node offers the metrics of that node's processes; they lag behind by Ray's
    report interval.

    Raises:
        ServiceUnavailable: Ray's head does not answer.
    """
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
    async with httpx.AsyncClient(timeout=_ANSWER_S, trust_env=False) as client:
        answers = await asyncio.gather(
            *(client.get(address) for address in addresses), return_exceptions=True
        )
    families: dict[str, list[str]] = {}
    for answer in answers:
        if isinstance(answer, httpx.Response) and answer.status_code == httpx.codes.OK:
            _collect(answer.text, families)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def _collect(text: str, families: dict[str, list[str]]) -> None:
    """Add our families; one that several nodes have gets one head and all samples."""
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
