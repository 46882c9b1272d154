"""What every exchange offers, and how its rounds are counted.

An exchange carries the partial results of one round between ranks; what they mean, and that they
are summed, is the caller's affair. This module knows no transport.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from cqil_dist.assignment import Round
from cqil_dist.errors import ExchangeError

Shape = tuple[int, int, int]
"""[C, N, D] of a partial result: tensors, tokens, model width."""

RING_ENTRIES = 8192


class Exchange(ABC):
    """A carrier of partial results between the ranks of one epoch.

    A partial result is [C, N, D]: C tensors of N tokens by model width D. C is told by the round,
    N by the step, D and the dtype by the connection, so that every rank knows the shape of what
    comes before it comes. All ranks walk the same rounds of the same steps in the same order. One
    thread at a time gathers; `close` may come from another.
    """

    rank: int
    stats: ExchangeStats

    @abstractmethod
    def begin_step(self, step: int, tokens: int) -> None:
        """Number the step that the next rounds belong to, and say how many tokens it has.

        All ranks use the same numbers.
        """

    @abstractmethod
    def gather(self, exchange_round: Round | None, own_CND: Tensor | None) -> Tensor | None:
        """Send this rank's partial result to those that need it, and wait for those it needs.

        Args:
            exchange_round: who needs whose partial result; None where nobody needs another's.
            own_CND: this rank's tensors: contiguous, in the exchange's dtype. None where it
                contributes nothing to this round.

        Returns:
            The tensors of all of `exchange_round.sources[rank]`, in rank order, valid until the
            next gather; or `own_CND` itself, in the shape that it came in, where this rank needs
            no others. None where it has no use for any: then it sends and does not wait.

        Raises:
            PeerLost: a peer closed its connection or missed the deadline.
            ProtocolError: a peer is in another step or round, or sent another shape.
            ExchangeError: closed, or already failed; or `own_CND` is not what the round needs.
        """

    def sum(self, exchange_round: Round | None, own_ND: Tensor | None) -> Tensor | None:
        """Return the sum of all partial results of a round, identical to the bit on every rank.

        Floating-point addition depends on its order, so every rank adds in rank order. Arguments
        and errors are those of `gather`, for one tensor a rank. Unlike what that returns, the
        result stays valid.
        """
        gathered_CND = self.gather(exchange_round, own_ND)
        if gathered_CND is None or gathered_CND is own_ND:
            return gathered_CND
        if len(gathered_CND) == 1:
            return gathered_CND[0].clone()
        total_ND = gathered_CND[0] + gathered_CND[1]
        for partial_ND in gathered_CND[2:]:
            total_ND += partial_ND
        return total_ND

    @abstractmethod
    def close(self) -> None:
        """Release the connections. Idempotent; unblocks a gather in another thread."""


def unfit(
    rank: int, exchange_round: Round, own: Tensor | None, shape: Shape, dtype: torch.dtype
) -> ExchangeError:
    """Make the error for a rank that passes something other than what it contributes to a round.

    Args:
        shape: [C, N, D] of what it contributes, in `dtype`, contiguous.
    """
    where = f"to round {exchange_round.index}"
    if own is None:
        return ExchangeError(f"rank {rank} contributes {where} but passed no partial result")
    return ExchangeError(
        f"rank {rank} passed a partial result of {own.dtype}, shape {tuple(own.shape)} and strides "
        f"{own.stride()} {where}, which takes a contiguous one of {dtype} and shape {shape}"
    )


class ExchangeStats:
    """The counters of one rank's exchange, and a ring of its latest waits.

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
        """Return counters, and the ring as lists "step", "round", "wait_s" (seconds), in order."""
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
