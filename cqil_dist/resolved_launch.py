"""A launch config whose model has been found: what follows from the two together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cqil_dist.assignment import Assignment, assign
from cqil_dist.launch_config import LaunchConfig
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.store import resolve
from cqil_dist.plan import Plan
from cqil_dist.progress import Progress


@dataclass(frozen=True)
class ResolvedLaunch:
    """What is to run where.

    Attributes:
        path: the model's directory on this machine.
    """

    config: LaunchConfig
    model: ModelConfig
    path: Path
    assignment: Assignment

    @property
    def actors(self) -> int:
        """Ranks and spares."""
        return self.assignment.world + self.config.spares

    @classmethod
    def of(cls, config: LaunchConfig, progress: Progress) -> Self:
        """Fetch the model if need be, and assign the plan's layers to ranks.

        Raises:
            ModelError, PlanError: the model or the plan cannot be used.
        """
        path = resolve(config.model, progress)
        model = ModelConfig.from_directory(path)
        plan = Plan.parse(config.plan, model.num_layers)
        world = config.ranks or max(group.size for group in plan.groups)
        return cls(config, model, path, assign(plan, world, model.vocab_size))
