"""What every exchange offers, and how its rounds are counted.

An exchange carries the partial results of one round between ranks; what they mean, and that they
are summed, is the caller's affair. This module knows no transport.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from cqil_dist.assignment import Round

RING_ENTRIES = 8192


class Exchange(Protocol):
    """Carries partial results between the ranks of one epoch.

    All ranks walk the same rounds of the same steps in the same order. One thread at a time
    gathers; `close` may come from another.
    """

    rank: int
    stats: ExchangeStats

    def begin_step(self, step: int) -> None:
        """Number the step that the next rounds belong to. All ranks use the same number."""
        ...

    def gather(
        self, round: Round, own: Tensor | None, shapes: Mapping[int, tuple[int, ...]]
    ) -> list[tuple[int, Tensor]]:
        """Send this rank's partial result to those that need it, and wait for those it needs.

        Args:
            round: who needs whose partial result.
            own: this rank's contribution: contiguous, in the exchange's dtype. None where it
                contributes nothing to this round.
            shapes: shape of each contribution, by source rank.

        Returns:
            (rank, tensor) for each of `round.sources[rank]`, in rank order; `own` by reference.
            Tensors of other ranks are views of receive buffers, valid until the next gather.
            Empty where this rank has no use for the result: then it sends and does not wait.

        Raises:
            PeerLost: a peer closed its connection or missed the deadline.
            ProtocolError: a peer is in another step or round, or sent another shape.
            ExchangeError: closed, or already failed; or `own` is not what the round needs.
        """
        ...

    def close(self) -> None:
        """Release the connections. Idempotent; unblocks a gather in another thread."""
        ...


def sum_in_rank_order(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The sum of what `Exchange.gather` returned, identical to the bit on every rank.

    Floating-point addition depends on its order, so every rank adds in rank order. The result
    shares no memory with the exchange's receive buffers, even for a single part.
    """
    (_, first), *others = parts
    if not others:
        return first.clone()
    (_, second), *others = others
    total = first + second
    for _, part in others:
        total += part
    return total


class ExchangeStats:
    """Counters of one rank's exchange, and a ring of its latest waits.

    Attributes:
        steps: steps begun.
        rounds: rounds this rank took part in, sending or receiving.
        rounds_led: rounds of which this rank is the leader; summed over ranks, each round of the
            run counts once.
        bytes_sent, bytes_received: frames, headers included.
    """

    def __init__(self, ring_entries: int = RING_ENTRIES) -> None:
        self.steps = 0
        self.rounds = 0
        self.rounds_led = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self._waits = 0
        # One record per assignment, so that a snapshot from another thread sees whole records.
        self._ring = np.zeros(ring_entries, [("step", "i8"), ("round", "i8"), ("wait_s", "f8")])

    def record_wait(self, step: int, round_index: int, wait_s: float) -> None:
        """Note the seconds spent in the gather of one round that received from a peer."""
        self._ring[self._waits % len(self._ring)] = (step, round_index, wait_s)
        self._waits += 1

    def snapshot(self) -> dict[str, int | list[int] | list[float]]:
        """Counters, and the ring as the lists "step", "round" and "wait_s" (seconds), in order."""
        waits, entries = self._waits, len(self._ring)
        ring = self._ring[:waits] if waits < entries else np.roll(self._ring, -(waits % entries))
        return {
            "steps": self.steps,
            "rounds": self.rounds,
            "rounds_led": self.rounds_led,
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "step": ring["step"].tolist(),
            "round": ring["round"].tolist(),
            "wait_s": ring["wait_s"].tolist(),
        }
