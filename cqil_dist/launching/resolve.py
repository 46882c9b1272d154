"""A launch config whose model has been found: what follows from the two together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cqil_dist.assignment import Assignment, assign, follow
from cqil_dist.engine.config import EngineConfig
from cqil_dist.errors import LaunchError, PlanError
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.model.adapter import Adapter
from cqil_dist.model.config import ModelConfig
from cqil_dist.plan import layers_text
from cqil_dist.progress import Progress
from cqil_dist.recommended.index import plan_for
from cqil_dist.recommended.record import note_missing_compensation
from cqil_dist.store.store import resolve


@dataclass(frozen=True)
class ResolvedLaunch:
    """A launch whose model and plan are known: what is to run where.

    Attributes:
        config: what the user asked for.
        model: the model's own numbers.
        path: the model's directory on this machine.
        adapter: the adapter's directory, or None.
        assignments: one of the plan and, where there is another to compare it with, one of that.
    """

    config: LaunchConfig
    model: ModelConfig
    path: Path
    adapter: Path | None
    assignments: tuple[Assignment, ...]

    @property
    def assignment(self) -> Assignment:
        """Return the assignment of the plan that requests run under where they name none."""
        return self.assignments[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Return what requests call the model under each plan."""
        name = self.config.served_model_name or self.config.model
        others = ["sequential" if a.plan.is_sequential else "compare" for a in self.assignments[1:]]
        return (name, *(f"{name}:{other}" for other in others))

    @property
    def actors(self) -> int:
        """Return the number of ranks and spares."""
        return self.assignment.world + self.config.spares

    @property
    def compared_note(self) -> str | None:
        """Return a caveat on the plan to compare with, as its layers lie where the first has them.

        It is None where each layer of it is whole, or split, as it would be in a launch of its own.
        """
        split = [
            layer
            for compared in self.assignments[1:]
            for layer in sorted(compared.split_layers ^ self._alone(compared).split_layers)
        ]
        if not split:
            return None
        return (
            f"layers {layers_text(split)} of the plan to compare with are computed as the first "
            "plan has them, whole or split, so that its speed is not that of a launch of its own"
        )

    def _alone(self, compared: Assignment) -> Assignment:
        """Return how another plan would be assigned by itself."""
        return assign(compared.plan, compared.world, self.model.shape, self.config.ungrouped)

    def engine(self, on_gpu: bool) -> EngineConfig:
        """Return the engine's numbers, for ranks on GPUs or on CPUs."""
        return self.config.resolved(self.model.max_positions, on_gpu)

    @classmethod
    def of(cls, config: LaunchConfig, progress: Progress) -> Self:
        """Fetch the model if need be, and assign the plan's layers to ranks.

        Raises:
            ModelError, PlanError: the model or the plan cannot be used.
            LaunchError: requests are to be longer than the model's positions, or layers are to be
                split over a single rank.
        """
        path = resolve(config.model, progress)
        model = ModelConfig.from_directory(path)
        config.max_len_for(model.max_positions)
        plan = plan_for(config.plan, config.model, model.num_layers)
        adapter = None if config.adapter is None else Path(config.adapter).expanduser().resolve()
        if adapter is None:
            note_missing_compensation(config.plan, config.model, progress)
        else:
            Adapter.made_for(adapter, model, plan)
        world = config.ranks or max(group.size for group in plan.groups)
        if config.ungrouped == "shard" and config.ranks is None and world == 1:
            raise LaunchError(
                "ungrouped is 'shard' but no group of the plan asks for more than 1 rank; say with "
                "ranks over how many to split the layers"
            )
        block = config.precision_for(model, on_gpu=False).weight_format.group
        assignments = [assign(plan, world, model.shape, config.ungrouped, block)]
        if config.compare is not None:
            other = plan_for(config.compare, config.model, model.num_layers)
            if other == plan and adapter is None:
                raise PlanError(f"the plan to compare {plan} with is the same plan")
            assignments.append(follow(other, assignments[0]))
        resolved = cls(config, model, path, adapter, tuple(assignments))
        if note := resolved.compared_note:
            progress.note(note)
        return resolved
