"""A local Ray cluster, started once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cqil_dist.launching.placement import connected


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A cluster that claims to have 8 CPUs, so that several launches fit at once on 2 cores."""
    with connected(None, local_cpus=8, verbose=False):
        yield
