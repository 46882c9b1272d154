"""How attentive the measuring client was: how long its event loop did not look at its sockets.

What arrives while the loop runs callbacks is noticed when it looks again. The lengths of these
turns therefore bound by how much a moment that was noted is late, whatever the turns were spent on:
parsing HTTP, collecting garbage, or waiting for a core that others use.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cqil_dist.outputs import percentile


class WatchedSelector(selectors.DefaultSelector):
    """Times the loop's turns between two looks at its sockets; at a cost below a microsecond each.

    Attributes:
        turns_s: seconds of each turn so far. The reader clears it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turns_s: list[float] = []
        self._woke: float | None = None

    def select(self, timeout: float | None = None) -> Any:
        if self._woke is not None:
            self.turns_s.append(time.perf_counter() - self._woke)
        ready = super().select(timeout)
        self._woke = time.perf_counter()
        return ready


@dataclass(frozen=True)
class Attention:
    """The client's own part in what was measured.

    Attributes:
        busy_share: of the time, 0 to 1, in which the client did not look at its sockets. Near 1 the
            client is what was measured.
        p99_ms, longest_ms: turns; a moment noted is at most that late.
    """

    busy_share: float
    p99_ms: float
    longest_ms: float

    @classmethod
    def of(cls, turns_s: Sequence[float], duration_s: float) -> Attention | None:
        """None where nothing was watched."""
        if not turns_s or duration_s <= 0:
            return None
        # A turn begun before the duration may reach into it.
        share = min(1.0, sum(turns_s) / duration_s)
        return cls(share, 1000 * percentile(turns_s, 99), 1000 * max(turns_s))
