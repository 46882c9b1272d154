"""Hands the chunks of one request from the engine's thread to its caller's."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator

from cqil_dist.errors import CqilError
from cqil_dist.outputs import Chunk


class ChunkStream:
    """The chunks of one request, handed from the engine's thread to the caller's.

    What is held reaches the caller when it is released: waking the caller's thread costs the
    engine's a fraction of a millisecond, which it can spare while the ranks compute.

    Iterating ends after the chunk with a finish reason, and raises the error a request failed
    with.

    Attributes:
        held: what the next `release` hands over, in order.
    """

    def __init__(self) -> None:
        self.held: deque[Chunk | CqilError] = deque()
        self._releasing = threading.Lock()
        self._queue: queue.SimpleQueue[Chunk | CqilError] = queue.SimpleQueue()

    def release(self) -> None:
        """Hand over what is held. Any thread may call this."""
        with self._releasing:  # the engine's thread, and one that closes the engine
            while self.held:
                self._queue.put(self.held.popleft())

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            item = self._queue.get()
            if isinstance(item, CqilError):
                raise item
            yield item
            if item.finish_reason is not None:
                return
