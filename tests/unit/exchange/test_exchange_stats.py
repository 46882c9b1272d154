from __future__ import annotations

import numpy as np

from cqil_dist.benchmarks.round_times import split_transfer_and_skew
from cqil_dist.exchange import ExchangeStats


def test_the_ring_keeps_the_latest_waits_in_order() -> None:
    stats = ExchangeStats(ring_entries=4)
    for step in range(6):
        stats.record_wait(step, 10 + step, step / 8)
    snapshot = stats.snapshot()
    assert snapshot["step"] == [2, 3, 4, 5]
    assert snapshot["round"] == [12, 13, 14, 15]
    assert snapshot["wait_s"] == [0.25, 0.375, 0.5, 0.625]


def test_a_ring_that_is_not_full_holds_only_what_was_recorded() -> None:
    stats = ExchangeStats(ring_entries=4)
    assert stats.snapshot()["step"] == []
    stats.record_wait(1, 2, 0.5)
    assert stats.snapshot() == {
        "steps": 0,
        "rounds": 0,
        "rounds_led": 0,
        "bytes_sent": 0,
        "bytes_received": 0,
        "step": [1],
        "round": [2],
        "wait_s": [0.5],
    }


def test_transfer_is_the_shortest_wait_of_a_round_and_skew_the_rest_of_the_longest() -> None:
    def ring(*records: tuple[int, int, float]) -> dict[str, list[float]]:
        steps, rounds, waits = zip(*records, strict=True)
        return {"step": list(steps), "round": list(rounds), "wait_s": list(waits)}

    times = split_transfer_and_skew(
        [
            ring((0, 0, 0.25), (0, 1, 0.5), (1, 0, 1.0)),
            ring((1, 0, 0.25), (0, 0, 0.375), (0, 2, 9.0)),
            ring((0, 0, 1.25), (0, 1, 0.5)),
        ]
    )
    # (0, 2) was seen by one rank only.
    np.testing.assert_array_equal(times.transfer_s, [0.25, 0.5, 0.25])
    np.testing.assert_array_equal(times.skew_s, [1.0, 0.0, 0.75])


def test_nothing_in_common_is_no_rounds() -> None:
    times = split_transfer_and_skew([ExchangeStats().snapshot()] * 2)
    assert times.transfer_s.shape == times.skew_s.shape == (0,)
