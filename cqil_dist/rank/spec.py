"""What the actors of a launch are told: plain values, worked out once by the driver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cqil_dist.assignment import Assignment
from cqil_dist.engine.config import EngineConfig
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.precision import Precision
from cqil_dist.rank.program import CacheShape


@dataclass(frozen=True)
class EngineSpec:
    """An engine's description, the same for its coordinator and all its ranks.

    Attributes:
        model: the name it was launched by.
        names: what requests call it under each plan.
        model_path: directory of the checkpoint on the node that launches.
        precision: the numbers that it is computed, stored, cached and sent in.
        assignments: one for each plan, over the same ranks.
        adapter: directory of the first plan's adapter, on every node; the others have none.
        engine: the numbers that bound it.
        threads: compute threads of a rank on a CPU.
        on_gpu: ranks compute on GPUs.
        pin: bind ranks to cores: "never", "always", or "if_possible": where nodes have enough.
    """

    model: str
    names: tuple[str, ...]
    model_path: Path
    config: ModelConfig
    assignments: tuple[Assignment, ...]
    adapter: Path | None
    precision: Precision
    engine: EngineConfig
    threads: int
    on_gpu: bool
    pin: str

    @property
    def world(self) -> int:
        """Return how many ranks there are."""
        return self.assignments[0].world

    @property
    def cache_shape(self) -> CacheShape:
        return CacheShape(self.engine.slots, self.engine.max_len)

    @property
    def max_message_bytes(self) -> int:
        """Return the bound on a coordinator-rank message: hidden states or logits, float32."""
        return 4 * self.engine.step_tokens * max(self.config.hidden_size, self.config.vocab_size)

    @property
    def max_exchange_bytes(self) -> int:
        """Return the bound on one partial result: a whole group's attention outputs, float32."""
        members = max(group.size for plan in self.assignments for group in plan.plan.groups)
        return 4 * self.engine.step_tokens * members * self.config.hidden_size
