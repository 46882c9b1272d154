"""The cluster's metrics are gathered once for all who ask at the same time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray

from cqil_dist.errors import ServiceUnavailable
from cqil_dist.serving import cluster_metrics
from cqil_dist.serving.cluster_metrics import ClusterMetrics


def test_many_who_ask_together_are_answered_by_one_gathering(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def nodes() -> list[dict[str, Any]]:
        asked.append("nodes")
        return []

    monkeypatch.setattr(ray, "nodes", nodes)

    async def ask() -> None:
        metrics = ClusterMetrics()
        assert set(await asyncio.gather(*(metrics() for _ in range(50)))) == {""}
        assert await metrics() == ""
        assert len(asked) == 1
        monkeypatch.setattr(cluster_metrics, "_FRESH_S", 0.0)
        await metrics()
        assert len(asked) == 2

    asyncio.run(ask())


def test_one_who_leaves_takes_nobody_with_him_and_a_failure_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def failing() -> str:
        await asyncio.sleep(0.01)
        raise ServiceUnavailable("Ray's head does not answer")

    monkeypatch.setattr(cluster_metrics, "_FRESH_S", 0.0)
    monkeypatch.setattr(ray, "nodes", list)

    async def ask() -> None:
        metrics = ClusterMetrics()
        with monkeypatch.context() as patch:
            patch.setattr(cluster_metrics, "_gathered", failing)
            await ask_while_one_leaves(metrics)
        assert await metrics() == ""

    async def ask_while_one_leaves(metrics: ClusterMetrics) -> None:
        leaving, staying = (asyncio.create_task(metrics()) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(ServiceUnavailable):
            await staying

    asyncio.run(ask())
