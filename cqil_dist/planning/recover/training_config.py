"""How an adapter is trained: plain, checked values; imports neither torch nor peft."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cqil_dist.errors import ConfigError
from cqil_dist.planning.measure.compute_config import MAX_SEED


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: of the optimizer.
        batch_size: windows a step.
        learning_rate: at its highest; falls to 0 by a cosine.
        warmup_steps: steps over which it rises.
        lora_r, lora_alpha: of peft's `LoraConfig`.
        seed: of the adapter's beginning and the windows' order.
        save_steps: steps between two saved states.
        eval_steps: steps between two looks at the held-out windows.
        gradient_checkpointing: compute groups a second time in place of keeping what is in them.
    """

    steps: int = 2000
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup_steps: int = 50
    lora_r: int = 32
    lora_alpha: int = 32
    seed: int = 0
    save_steps: int = 100
    eval_steps: int = 100
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        counted = ("steps", "batch_size", "lora_r", "lora_alpha", "save_steps", "eval_steps")
        for name in counted:
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {value} but must be at least 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed is {self.seed} but must be from 0 to {MAX_SEED}")
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(
                f"warmup_steps is {self.warmup_steps} but must be at least 0 and below steps, "
                f"{self.steps}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate} but must be above 0")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
