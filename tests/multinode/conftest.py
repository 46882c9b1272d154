"""A cluster over hosts of their own: see cqil_dist/benchmarks/hosts.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import MAX_LEN
from tiny_models import TinyModel, TinyModelFactory, tiny_config

from cqil_dist.benchmarks.hosts import Network, why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (reason := why_not()) is not None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    """Room for streams that last long enough to be disturbed."""
    return tiny_model(tiny_config(max_position_embeddings=MAX_LEN))


@pytest.fixture(scope="session")
def cabled() -> Iterator[Network]:
    with Network(4) as network:
        yield network


@pytest.fixture(scope="module")
def network(cabled: Network) -> Network:
    """A head, which has no room for ranks, and three nodes that have room for one each."""
    head = cabled.hosts[0]
    for host in cabled.hosts:
        if not host.processes("raylet/raylet"):
            host.start_ray(None if host is head else head, cpus=0 if host is head else 1)
    return cabled
