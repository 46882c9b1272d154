"""The way in: `launch` runs a model, and closing what it returns leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Self

import ray

from cqil_dist.inputs import Prompt
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.launching.resolve import ResolvedLaunch
from cqil_dist.launching.start import ANSWER_TIMEOUT_S, bring_up, ray_errors
from cqil_dist.outputs import Chunk, Completion
from cqil_dist.plan import PlanSource
from cqil_dist.progress import Progress, SilentProgress
from cqil_dist.status import Status


def launch(
    model: str,
    plan: PlanSource = "sequential",
    ranks: int | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> RunningEngine:
    """Run a model under a plan on Ray actors.

    Args:
        model, plan, ranks, **options: the fields of `LaunchConfig`.
        progress: where long steps report; silent by default.

    Returns:
        The running engine: use it in a `with` block, or close it.

    Raises:
        PlanError, ModelError: the plan or the model cannot be used; nothing was started.
        InsufficientResources: the cluster lacks what was asked for.
        LaunchError: an option is wrong, or the cluster or an actor failed.
        RankUnavailable: the ranks could not come together.
    """
    config = LaunchConfig(model, plan, ranks, **options)
    return RunningEngine(config, progress or SilentProgress())


class RunningEngine:
    """A launched model, as `launch` returns it.

    Attributes:
        config: what the user asked for.
        plan, assignment: which layers run together, and on which ranks.
        service: the coordinator that serves, and how to reach it.
        client: a connection to it.
    """

    def __init__(self, config: LaunchConfig, progress: Progress) -> None:
        resolved = ResolvedLaunch.of(config, progress)
        self.config = config
        self.assignment = resolved.assignment
        self.plan = self.assignment.plan
        with ExitStack() as stack, ray_errors():
            self.service = bring_up(resolved, stack, progress)
            self.client = stack.enter_context(self.service.client())
            self._stack = stack.pop_all()

    def generate(self, prompt: Prompt, **sampling: Any) -> Iterator[Chunk]:
        """Stream a completion.

        Args:
            prompt: text, token ids, or chat messages with "role" and "content".
            **sampling: the fields of `SamplingParams`; those left out take the model's defaults.

        Raises:
            RequestError: the prompt or a sampling value is wrong.
            CqilError: the engine failed.
        """
        return self.client.generate(prompt, stream=True, **sampling)

    def complete(self, prompt: Prompt, **sampling: Any) -> Completion:
        """Generate a whole completion at once; arguments and errors are those of `generate`."""
        completion: Completion = self.client.generate(prompt, **sampling)
        return completion

    def status(self) -> Status:
        """Return the engine's plan and ranks, and how busy it is."""
        return self.client.status()

    def exchanges_per_token(self) -> float:
        """Return how many exchanges a step took, as they are counted; 0 before the first step."""
        stats = self.exchange_stats()
        led: int = sum(rank["rounds_led"] for rank in stats)
        steps: int = max(rank["steps"] for rank in stats)
        return led / max(1, steps)

    def exchange_stats(self) -> list[dict[str, Any]]:
        """Return each rank's exchange counters and latest waits (`ExchangeStats.snapshot`).

        They begin anew when the ranks connect again after a loss.
        """
        with ray_errors():
            stats: list[dict[str, Any]] = ray.get(
                self.service.coordinator.exchange_stats.remote(), timeout=ANSWER_TIMEOUT_S
            )
        return stats

    def close(self) -> None:
        """Stop every actor, and the local cluster if it is ours. Idempotent."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
