"""What a training run needs to go on after it was interrupted, in one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cqil_dist.errors import ConfigError
from cqil_dist.whole_file import whole_file

if TYPE_CHECKING:
    from peft import PeftModel

_FILE = "training.pt"


@dataclass
class TrainingLog:
    """What a training run has shown so far.

    Attributes:
        losses: KL divergence of each step's windows, nats a token.
        held_out: by number of steps done, that of the held-out windows.
    """

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingState:
    """A run's trained weights, optimizer and log, and the file that they are saved to.

    Args:
        folder: where the file goes.
        identity: what tells the run from others.
    """

    folder: Path
    identity: Mapping[str, Any]
    model: PeftModel
    optimizer: torch.optim.Optimizer

    def resume(self) -> TrainingLog:
        """Go on from what was saved, if anything was.

        Raises:
            ConfigError: it is of another run.
        """
        from peft import set_peft_model_state_dict

        if not (file := self.folder / _FILE).is_file():
            return TrainingLog()
        state = torch.load(file, map_location=self.model.device, weights_only=True)
        if changed := [k for k, value in state["identity"].items() if value != self.identity[k]]:
            raise ConfigError(
                f"{self.folder} holds a run with another {', '.join(changed)}; choose another "
                "folder, or remove that one to begin anew"
            )
        set_peft_model_state_dict(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        return TrainingLog(**state["log"])

    def save(self, log: TrainingLog) -> None:
        from peft import get_peft_model_state_dict

        state = {
            "identity": dict(self.identity),
            "adapter": get_peft_model_state_dict(self.model),
            "optimizer": self.optimizer.state_dict(),
            "log": asdict(log),
        }
        with whole_file(self.folder / _FILE) as file:
            torch.save(state, file)
