"""How an adapter is trained: plain, checked values; imports neither torch nor peft."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cqil_dist.errors import ConfigError
from cqil_dist.planning.measure.compute_config import MAX_SEED
from cqil_dist.settings import check_settings, number, setting, whole


@dataclass(frozen=True)
class TrainingConfig:
    """The settings for training an adapter: by AdamW, with a warm-up and a cosine that ends at 0.

    Raises:
        ConfigError: naming the field, its value and the rule.
    """

    steps: int = setting(2000, "Number of optimizer steps.", whole(1))
    batch_size: int = setting(8, "Windows of text of a step.", whole(1))
    learning_rate: float = setting(1e-4, "Learning rate at its peak.", number())
    warmup_steps: int = setting(
        50, "Steps until the peak learning rate, fewer than all of them.", whole(0)
    )
    lora_r: int = setting(32, "Rank of the LoRA adapter.", whole(1))
    lora_alpha: int = setting(32, "LoRA's alpha; the scale is alpha / rank.", whole(1))
    seed: int = setting(
        0, "Seed of the adapter's first values and of the text's order.", whole(0, MAX_SEED)
    )
    save_steps: int = setting(100, "Steps between two saved states.", whole(1))
    eval_steps: int = setting(100, "Steps between two evaluations on held-out text.", whole(1))
    gradient_checkpointing: bool = setting(
        False, "Compute groups twice instead of keeping them: less memory, a third more time."
    )

    def __post_init__(self) -> None:
        check_settings(self, ConfigError)
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                f"warmup_steps is {self.warmup_steps} but must be below steps, {self.steps}"
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step; steps count from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
