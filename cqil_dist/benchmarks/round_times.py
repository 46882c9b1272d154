"""Splits the time of exchange rounds into moving the data and waiting for a slower rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RoundTimes:
    """The seconds of transfer and of skew, one entry a round, in the order of rounds."""

    transfer_s: npt.NDArray[np.float64]
    skew_s: npt.NDArray[np.float64]


def split_transfer_and_skew(snapshots: Sequence[Mapping[str, Any]]) -> RoundTimes:
    """Separate the time of moving data from that of waiting for a slower rank.

    The rank that arrives last in a round finds all data there, so that the shortest wait of any
    rank is the transfer. The skew is the longest wait less the shortest.

    Args:
        snapshots: `ExchangeStats.snapshot()` of each rank. Rounds in which fewer than two ranks
            waited are left out, as there is nothing to compare.
    """
    waits: dict[tuple[int, int], dict[int, float]] = {}
    for rank, snapshot in enumerate(snapshots):
        records = zip(snapshot["step"], snapshot["round"], snapshot["wait_s"], strict=True)
        for step, round_index, wait_s in records:
            waits.setdefault((step, round_index), {})[rank] = wait_s
    shared = [list(waits[key].values()) for key in sorted(waits) if len(waits[key]) > 1]
    shortest = np.array([min(wait) for wait in shared], np.float64)
    longest = np.array([max(wait) for wait in shared], np.float64)
    return RoundTimes(transfer_s=shortest, skew_s=longest - shortest)
