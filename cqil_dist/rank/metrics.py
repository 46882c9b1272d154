"""A rank's metrics, as Ray exports them to Prometheus: where its time goes, by group."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence

from ray.util.metrics import Counter

from cqil_dist.rank.clock import StepClock
from cqil_dist.timeline import SpanKind

_PUBLISH_S = 2.0


class RankMetrics:
    """The publisher of the seconds that a rank's clock adds up, every two seconds.

    Args:
        models: the name that requests call the model by under each plan.
    """

    def __init__(self, clock: StepClock, rank: int, models: Sequence[str]) -> None:
        self._clock = clock
        self._rank = rank
        self._models = models
        tags = ("rank", "model", "group")
        self._compute = Counter(
            "cqil_group_compute_seconds",
            "Time a rank has computed of a group of the plan, the vocabulary head being the last.",
            tag_keys=tags,
        )
        self._exchange = Counter(
            "cqil_group_exchange_seconds",
            "Time a rank has spent in a group's exchanges, waiting for peers included.",
            tag_keys=tags,
        )
        self._published: defaultdict[tuple[int, int, int], float] = defaultdict(float)
        self._stopping = threading.Event()
        # What was counted in earlier epochs has been published by theirs.
        self._published.update(clock.seconds)

    def start(self) -> None:
        """Publish from now on, on a thread of its own."""
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def stop(self) -> None:
        """Publish what is left, and end, without waiting for it."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(_PUBLISH_S):
            self._publish()
        self._publish()

    def _publish(self) -> None:
        for key, seconds in list(self._clock.seconds.items()):
            if (new := seconds - self._published[key]) <= 0:
                continue
            plan, group, kind = key
            counter = self._exchange if SpanKind(kind).is_exchange else self._compute
            tags = {"rank": str(self._rank), "model": self._models[plan], "group": str(group)}
            counter.inc(new, tags=tags)
            self._published[key] = seconds
