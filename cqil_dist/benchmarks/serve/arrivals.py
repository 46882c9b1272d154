"""When requests are due: a seeded renewal process. Knows nothing of what is asked."""

from __future__ import annotations

import math
import random
from itertools import accumulate


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which each of `count` requests is due, ascending from 0.

    Gaps are drawn from a gamma distribution with mean 1 / `rate` and shape `burstiness`: 1 makes
    a Poisson process, less comes in bursts, more is more regular. The same seed gives the same
    moments, at another rate the same moments scaled.

    Args:
        rate: requests per second, above 0; infinity makes all of them due at once.
        burstiness: above 0.
    """
    if math.isinf(rate):
        return [0.0] * count
    draw = random.Random(seed)
    gaps = (draw.gammavariate(burstiness, 1 / (burstiness * rate)) for _ in range(count - 1))
    return list(accumulate(gaps, initial=0.0))
