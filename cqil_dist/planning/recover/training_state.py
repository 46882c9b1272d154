"""The saved state of a training run, from which it resumes after an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cqil_dist.errors import ConfigError
from cqil_dist.records import whole_file

if TYPE_CHECKING:
    from peft import PeftModel

STATE = "training.pt"


@dataclass
class TrainingLog:
    """The losses of a training run so far.

    Attributes:
        losses: KL divergence of each step's windows, in nats a token.
        held_out: KL divergence of the held-out windows after a number of steps, by that number.
    """

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)


class TrainingState:
    """A run's trained weights, optimizer and log, saved in one file."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Read the saved state, if there is one.

        Args:
            folder: where the file is.
            identity: values, by name, in which the run differs from all others.

        Raises:
            ConfigError: the saved state is damaged, or of another run.
        """
        self._file = folder / STATE
        self._identity = dict(identity)
        self._saved: dict[str, Any] | None = None
        if self._file.is_file():
            self._saved = _read(self._file)
            saved = self._saved["identity"]
            names = self._identity.keys() | saved.keys()
            if other := sorted(n for n in names if self._identity.get(n) != saved.get(n)):
                raise ConfigError(
                    f"{folder} holds a run with another {', '.join(other)}; choose another folder, "
                    "or remove that one to begin anew"
                )

    def resume(self, model: PeftModel, optimizer: torch.optim.Optimizer) -> TrainingLog:
        """Load the saved weights and optimizer; return the log, which is empty for a new run."""
        from peft import set_peft_model_state_dict

        if self._saved is None:
            return TrainingLog()
        set_peft_model_state_dict(model, self._saved["adapter"])
        optimizer.load_state_dict(self._saved["optimizer"])
        log = TrainingLog(**self._saved["log"])
        self._saved = None
        return log

    def save(self, model: PeftModel, optimizer: torch.optim.Optimizer, log: TrainingLog) -> None:
        from peft import get_peft_model_state_dict

        state = {
            "identity": self._identity,
            "adapter": get_peft_model_state_dict(model),
            "optimizer": optimizer.state_dict(),
            "log": asdict(log),
        }
        with whole_file(self._file) as file:
            torch.save(state, file)


def _read(file: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        saved["identity"].keys()
    except (OSError, MemoryError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    except Exception as error:  # an unpickler raises anything for damaged bytes
        raise ConfigError(
            f"{file} is damaged ({error!r}); choose another folder, or remove {file.parent} to "
            "begin anew"
        ) from error
    return saved
