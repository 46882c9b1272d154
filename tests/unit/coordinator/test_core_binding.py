"""Which cores ranks are bound to."""

from __future__ import annotations

import pytest

from cqil_dist.coordinator.core_binding import bind_cores
from cqil_dist.errors import LaunchError
from cqil_dist.rank.mesh_spec import ActorState


def on(node: str, *cores: int) -> ActorState:
    """An actor on a node, whose process may use these cores of it."""
    return ActorState(node, 1, cores, None, -1, frozenset())


FOUR = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("pin", "threads", "states", "cores", "spins"),
    [
        pytest.param(
            "if_possible",
            2,
            [on("a", *FOUR), on("a", *FOUR)],
            ((0, 1), (2, 3)),
            "long",
            id="ranks of one node share no core",
        ),
        pytest.param(
            "always",
            2,
            [on("a", 0, 1), on("b", 0, 1)],
            ((0, 1), (0, 1)),
            "long",
            id="every node has cores of its own",
        ),
        pytest.param(
            "if_possible",
            2,
            [on("a", 0, 1, 2), on("a", 0, 1, 2)],
            ((), ()),
            "never",
            id="ranks short of cores stay free, and leave the cores to each other",
        ),
        pytest.param(
            "never",
            2,
            [on("a", *FOUR), on("a", *FOUR)],
            ((), ()),
            "shortly",
            id="ranks that are not to be bound stay free",
        ),
    ],
)
def test_ranks_are_bound_where_there_are_cores(
    pin: str,
    threads: int,
    states: list[ActorState],
    cores: tuple[tuple[int, ...], ...],
    spins: str,
) -> None:
    binding = bind_cores(pin, threads, states)
    assert binding.cores == cores
    assert binding.spin_s == {"long": 0.02, "shortly": 0.0005, "never": 0.0}[spins]


def test_too_few_cores_to_bind_as_asked_are_named() -> None:
    with pytest.raises(LaunchError, match="pin asks for 2 cores a rank, but a node has fewer"):
        bind_cores("always", 2, [on("a", 0, 1, 2), on("a", 0, 1, 2)])
