"""A Ray cluster over several hosts, which tests/faults/hosts.py makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.hosts import Network, why_not
from helpers.nodes import MAX_LEN
from helpers.tiny_models import TinyModel, TinyModelFactory, tiny_config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (reason := why_not()) is not None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    """A model with a context for streams that last long enough to be disturbed."""
    return tiny_model(tiny_config(max_position_embeddings=MAX_LEN))


@pytest.fixture(scope="session")
def cabled() -> Iterator[Network]:
    with Network(4) as network:
        yield network


@pytest.fixture(scope="module")
def network(cabled: Network) -> Network:
    """A network of a head, which has no room for ranks, and three nodes with room for one each."""
    cabled.start_ray()
    return cabled
