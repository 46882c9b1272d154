"""The engine's metrics, as Ray exports them to Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ray.util.metrics import Counter, Gauge, Histogram

from cqil_dist.outputs import Completion
from cqil_dist.status import EngineStatus, Recovery

_RECOVERY_BUCKETS_S = [0.1, 0.3, 1, 2, 4, 8, 15, 30, 60, 120, 300]
_FIRST_TOKEN_BUCKETS_S = [0.01, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60]
_TOKEN_BUCKETS_S = [0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5, 1, 3]
_REQUEST_BUCKETS_S = [0.1, 0.3, 0.6, 1, 2, 4, 8, 15, 30, 60, 120, 300]
_WATCH_S = 1.0


class EngineMetrics:
    """The counters, histograms and gauges of one engine; `stop` them with it."""

    def __init__(self) -> None:
        self._recoveries = Counter("cqil_recoveries", "Losses of a rank that were made good.")
        self._recovery = Histogram(
            "cqil_recovery_seconds",
            "Time to recover from the loss of a rank, by phase.",
            boundaries=_RECOVERY_BUCKETS_S,
            tag_keys=("phase",),
        )
        self._first_token = Histogram(
            "cqil_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            boundaries=_FIRST_TOKEN_BUCKETS_S,
        )
        self._inter_token = Histogram(
            "cqil_inter_token_latency_seconds",
            "Between consecutive tokens of a request.",
            boundaries=_TOKEN_BUCKETS_S,
        )
        self._request = Histogram(
            "cqil_request_seconds",
            "From a request's arrival to its last token.",
            boundaries=_REQUEST_BUCKETS_S,
        )
        self._finished = Counter(
            "cqil_requests",
            "Requests answered to their end, by reason.",
            tag_keys=("finish_reason",),
        )
        self._prompt_tokens = Counter("cqil_prompt_tokens", "Tokens of finished prompts.")
        self._tokens = Counter("cqil_generated_tokens", "Tokens of finished completions.")
        self._gauges = {
            "running_requests": Gauge("cqil_running_requests", "Requests that hold a slot."),
            "waiting_requests": Gauge("cqil_waiting_requests", "Requests that wait for a slot."),
            "free_slots": Gauge("cqil_free_slots", "KV slots that no request holds."),
        }
        self._stopping = threading.Event()

    def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Report the counts of an engine's `status` every second, on a thread of its own."""

        def report() -> None:
            while not self._stopping.wait(_WATCH_S):
                counts = status()
                for name, gauge in self._gauges.items():
                    gauge.set(getattr(counts, name))

        threading.Thread(target=report, name="metrics", daemon=True).start()

    def note_completion(self, completion: Completion) -> None:
        """Count a request that has ended, its tokens and its times."""
        timings = completion.timings
        self._finished.inc(tags={"finish_reason": completion.finish_reason})
        for counter, count in (
            (self._prompt_tokens, completion.usage.prompt_tokens),
            (self._tokens, completion.usage.completion_tokens),
        ):
            if count:  # Ray's counters refuse to stand still
                counter.inc(count)
        if completion.token_ids:  # one that only scores its prompt has no token's time
            self._first_token.observe(timings.ttft_ms / 1000)
            self._request.observe(timings.total_ms / 1000)
        for latency_ms in timings.itl_ms:
            self._inter_token.observe(latency_ms / 1000)

    def note_recovery(self, recovery: Recovery) -> None:
        """Count a loss that has been made good, and the seconds of its phases."""
        self._recoveries.inc()
        for phase, seconds in {**recovery.phases, "total": recovery.seconds}.items():
            self._recovery.observe(seconds, tags={"phase": phase})

    def stop(self) -> None:
        """End the reports of `watch`."""
        self._stopping.set()
