"""How an adapter is trained: plain, checked values; imports neither torch nor peft."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cqil_dist.errors import LaunchError


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps: of the optimizer.
        batch: windows a step.
        learning_rate: at its highest; falls to 0 by a cosine.
        warmup: steps over which it rises.
        rank, alpha: of LoRA.
        seed: of the adapter's beginning and the windows' order.
        checkpoint_every: steps between two saved states.
        evaluate_every: steps between two looks at the held-out windows.
        gradient_checkpointing: compute groups a second time in place of keeping what is in them.
    """

    steps: int = 2000
    batch: int = 8
    learning_rate: float = 1e-4
    warmup: int = 50
    rank: int = 32
    alpha: int = 32
    seed: int = 0
    checkpoint_every: int = 100
    evaluate_every: int = 100
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        counted = ("steps", "batch", "rank", "alpha", "checkpoint_every", "evaluate_every")
        for name in counted:
            if (value := getattr(self, name)) < 1:
                raise LaunchError(f"{name} is {value} but must be at least 1")
        if not 0 <= self.warmup < self.steps:
            raise LaunchError(
                f"warmup is {self.warmup} but must be at least 0 and below steps, {self.steps}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise LaunchError(f"learning_rate is {self.learning_rate} but must be above 0")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
