"""Keeps account of the KV slots and of what lies in each of them.

Knows sequences by their tokens alone; decides neither who runs nor in which order.
"""

from __future__ import annotations

import heapq

from cqil_dist.engine.sequence import Sequence


class SlotPool:
    """Hands KV slots to sequences and remembers whose keys and values are in them.

    Args:
        size: number of slots.

    Attributes:
        contents: for each slot, the sequence that computed into it last, whether it still runs or
            has ended. Its first `computed` tokens, under its plan, are valid there. None where no
            sequence has been.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.contents: list[Sequence | None] = [None] * size
        self._free = [*range(size)]  # a heap: the lowest first

    @property
    def free(self) -> int:
        """The number of slots that no sequence holds."""
        return len(self._free)

    def give(self, sequence: Sequence) -> None:
        """Let a sequence compute into the lowest free slot; there has to be one."""
        # Low slots stay adjacent, and adjacent slots are views of the cache, not copies.
        slot = heapq.heappop(self._free)
        self.contents[slot] = sequence
        sequence.slot = slot
        sequence.computed = 0

    def take_back(self, sequence: Sequence) -> None:
        """Free the slot of a sequence that has ended; what it computed lies there until reuse."""
        assert sequence.slot is not None, "it was given one"
        heapq.heappush(self._free, sequence.slot)
        sequence.slot = None

    def lose_cache(self) -> None:
        """Note that the ranks' caches are gone: no slot holds anything that is valid.

        Sequences keep their slots, and compute all their tokens again.
        """
        for sequence in self.contents:
            if sequence is not None:
                sequence.computed = 0
