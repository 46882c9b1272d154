"""One model, and what is kept of measuring it: text that it said, and how far plans are from it.

Under the cache directory, for each model by its content:

    plans/<model>/sampled-*.pt                   text that the model said
    plans/<model>/<how>/compared-*.jsonl         groups and plans measured on a text
    plans/<model>/<how>/scored-*.json            the original, scored on a text or a task
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cqil_dist.errors import ConfigError, PlanError, TextError
from cqil_dist.model.adapter import Adapter
from cqil_dist.model.config import ModelConfig
from cqil_dist.planning.measure.compute_config import ComputeConfig
from cqil_dist.planning.measure.grouped_model import load_model
from cqil_dist.planning.measure.sampling import SeedPrompts, sampled_windows
from cqil_dist.planning.measure.windows import Windows, read_windows
from cqil_dist.progress import Progress
from cqil_dist.rank.memory import keep_freed_memory
from cqil_dist.recommended.index import plan_for
from cqil_dist.records import require_folder
from cqil_dist.store.cache_entry import cache_dir
from cqil_dist.store.store import content_sha256, resolve
from cqil_dist.store.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cqil_dist.plan import Plan, PlanSource

_SAMPLED_TOKENS = 262_144

# Kept measurements are of this version. It is raised by hand with every change to what is computed
# (the group equations, text windows, compensation, scores), so that nothing measured by other
# arithmetic is taken up again, and an edit of a comment costs nobody hours.
MEASUREMENT_VERSION = 1


@dataclass(frozen=True)
class MeasuredModel:
    """A model that is measured.

    Attributes:
        name: what the user calls it.
        device: where it is computed.
        dtype: of its weights there.
        matmul_precision: of float32 products, in torch's words.
    """

    name: str
    path: Path
    device: torch.device
    dtype: torch.dtype
    matmul_precision: str
    progress: Progress

    @classmethod
    def of(cls, name: str, computing: ComputeConfig, progress: Progress) -> MeasuredModel:
        """Fetch the model if need be. Sets the process's precision of float32 products.

        Raises:
            ModelError: the model cannot be found.
            ConfigError: there is no such device.
        """
        device, dtype = computing.device, computing.dtype
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda' but torch sees no GPU; install its CUDA build")
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        torch.set_float32_matmul_precision(computing.matmul_precision)
        keep_freed_memory()
        return cls(
            name,
            resolve(name, progress),
            torch.device(device),
            getattr(torch, dtype),
            computing.matmul_precision,
            progress,
        )

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_directory(self.path)

    def plan(self, source: PlanSource) -> Plan:
        """Raises PlanError where there is no such plan for this model."""
        return plan_for(source, self.name, self.config.num_layers)

    def concurrent_plan(self, source: PlanSource) -> Plan:
        """One that loses something. Raises PlanError where there is none, or it loses nothing."""
        plan = self.plan(source)
        if plan.is_sequential:
            raise PlanError(f"plan {plan} is the original model: it loses nothing to win back")
        return plan

    @cached_property
    def model(self) -> PreTrainedModel:
        return load_model(self.path, self.dtype, self.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path)

    @cached_property
    def folder(self) -> Path:
        """Where what is measured of this model is kept. Raises ConfigError if nothing can be."""
        files = sorted([self.path / "config.json", *self.path.glob("*.safetensors")])
        content = "".join(content_sha256(file.resolve(), self.progress) for file in files)
        folder = cache_dir() / "plans" / hashlib.sha256(content.encode()).hexdigest()[:16]
        require_folder(folder)
        return folder

    def windows(self, files: Sequence[Path], length: int, tokens: int | None, seed: int) -> Windows:
        """Calibration text: of these files, or where there are none, of the model's own.

        Args:
            tokens: how much; None for all that the files hold, or 262,144 of the model's own.

        Raises:
            TextError: the files cannot be read or hold too little, or the model takes less at once.
        """
        if length > self.config.max_positions:
            raise TextError(
                f"windows are to have {length} tokens but the model takes "
                f"{self.config.max_positions}; give a smaller --window"
            )
        if files:
            count = None if tokens is None else max(1, tokens // length)
            return read_windows(files, self.tokenizer, length, count, seed, self.progress)
        return self._sampled(length, tokens or _SAMPLED_TOKENS, seed)

    def extended(self, text: Windows, tokens: int, seed: int) -> Windows:
        """A text with so many tokens of the model's own, half of them going on from it."""
        if not tokens:
            return text
        sampled = self._sampled(text.token_ids_WT.shape[1], tokens, seed, text)
        return text.mixed_with(sampled, seed)

    def _sampled(self, length: int, tokens: int, seed: int, text: Windows | None = None) -> Windows:
        return sampled_windows(
            self.model,
            self.config,
            SeedPrompts.ordinary(self.config.vocab_size, self.tokenizer, text),
            length,
            max(1, tokens // length),
            seed,
            self.folder,
            self.numerics,
            self.progress,
        )

    @property
    def results(self) -> Path:
        """Folder of what depends on how the model is computed, and by which programs."""
        programs = [f"{name}-{version}" for name, version in _programs().items()]
        return self.folder / "-".join([self.numerics, *programs])

    @property
    def numerics(self) -> str:
        """How, where it makes a difference to what is measured."""
        return "-".join(self._computed.values())

    @property
    def setting(self) -> dict[str, str]:
        """How the model is computed, and by which programs, for people."""
        return {**self._computed, **_programs()}

    @property
    def _computed(self) -> dict[str, str]:
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "matmul_precision": self.matmul_precision,
        }

    def adapter(self, path: Path, plan: Plan) -> Adapter:
        """An adapter that can be merged.

        Raises:
            CheckpointError: it is damaged, or made for a model of another shape.
            PlanError: it was made for another plan.
        """
        return Adapter.made_for(path, self.config, plan)


def _programs() -> dict[str, str]:
    """Versions of everything that decides what is measured."""
    return {
        "cqil-dist": f"{version('cqil-dist')}+{MEASUREMENT_VERSION}",
        **{name: version(name) for name in ("torch", "transformers")},
    }
