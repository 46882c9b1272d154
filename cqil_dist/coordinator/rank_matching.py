"""Which actor becomes which rank."""

from __future__ import annotations

from collections.abc import Mapping

from cqil_dist.rank.mesh_spec import ActorState


def match_ranks(
    world: int, states: Mapping[int, ActorState], previous: Mapping[int, int]
) -> dict[int, int] | None:
    """Which actor is which rank; None where there are fewer actors than ranks.

    A rank goes to an actor that holds its weights: the one that had it before, else the one that
    holds the fewest others. What is left over goes first to the actors that had those ranks.

    Args:
        states: of the actors that answer, by index.
        previous: index of the actor that was each rank, where there was one.
    """
    if len(states) < world:
        return None
    seats: dict[int, int] = {}

    def seat(rank: int, candidates: list[int]) -> None:
        free = [index for index in candidates if index not in seats.values()]
        if rank not in seats and free:
            seats[rank] = min(
                free, key=lambda i: (i != previous.get(rank), len(states[i].ranks), i)
            )

    for rank in range(world):
        seat(rank, [index for index, state in states.items() if rank in state.ranks])
    for rank in range(world):
        seat(rank, [previous[rank]] if previous.get(rank) in states else [])
    for rank in range(world):
        seat(rank, list(states))
    return seats
