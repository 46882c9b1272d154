"""The model that planning measures, and the measurements of it that are kept.

The cache directory has a folder for each model, named by the checksum of its files:

    plans/<model>/sampled-*.pt                   text sampled from the model
    plans/<model>/<setting>/compared-*.jsonl     groups and plans measured on a text
    plans/<model>/<setting>/scored-*.json        the original model's scores on a text or a task
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

# Part of the key of every kept measurement. It is raised by hand with each change to what is
# computed (the group equations, text windows, compensation, scores), so that nothing measured by
# other arithmetic is used again, and editing a comment costs nobody hours.
MEASUREMENT_VERSION = 1


@dataclass(frozen=True)
class MeasuredModel:
    """A model, and the device and precision that it is measured in.

    Attributes:
        name: the model's name or path, as the user gave it.
        path: the directory of its files.
        dtype: of its weights.
        matmul_precision: of float32 products, as torch names it.
    """

    name: str
    path: Path
    device: torch.device
    dtype: torch.dtype
    matmul_precision: str
    progress: Progress

    @classmethod
    def of(cls, name: str, computing: ComputeConfig, progress: Progress) -> MeasuredModel:
        """Find the model, and download it if necessary.

        This sets the process's precision of float32 products.

        Raises:
            ModelError: the model cannot be found.
            ConfigError: the device is "cuda", but there is no GPU.
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
        """Return the plan that the user gave. Raises PlanError if it is none for this model."""
        return plan_for(source, self.name, self.config.num_layers)

    def concurrent_plan(self, source: PlanSource) -> Plan:
        """Return the plan that the user gave. Raises PlanError also if it changes nothing."""
        plan = self.plan(source)
        if plan.is_sequential:
            raise PlanError(
                f"plan {plan} is the original model: it loses nothing to win back; give another"
            )
        return plan

    @cached_property
    def model(self) -> PreTrainedModel:
        return load_model(self.path, self.dtype, self.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path)

    @cached_property
    def folder(self) -> Path:
        """Return the model's folder in the cache. Raises ConfigError if it is not writable."""
        files = sorted([self.path / "config.json", *self.path.glob("*.safetensors")])
        content = "".join(content_sha256(file.resolve(), self.progress) for file in files)
        folder = cache_dir() / "plans" / hashlib.sha256(content.encode()).hexdigest()[:16]
        require_folder(folder)
        return folder

    def windows(self, files: Sequence[Path], length: int, tokens: int | None, seed: int) -> Windows:
        """Read calibration text from files or, if none are given, sample it from the model.

        Args:
            length: tokens of a window.
            tokens: how many in all; None takes everything in the files, or samples 262,144.
            seed: of the windows' choice, or of the sampling.

        Raises:
            TextError: a file cannot be read, the files hold too little text, or windows are longer
                than the model's context.
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
        """Mix a text with so many tokens sampled from the model, half of which continue it."""
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
        """Return the folder of measurements by this device, precision and programs' versions."""
        programs = [f"{name}-{version}" for name, version in _programs().items()]
        return self.folder / "-".join([self.numerics, *programs])

    @property
    def numerics(self) -> str:
        """Return the device, dtype and precision in one word, as part of a cache key."""
        return "-".join(self._computed.values())

    @property
    def setting(self) -> dict[str, str]:
        """Return the device, dtype, precision and versions, for reports."""
        return {**self._computed, **_programs()}

    @property
    def _computed(self) -> dict[str, str]:
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "matmul_precision": self.matmul_precision,
        }

    def adapter(self, path: Path, plan: Plan) -> Adapter:
        """Read the adapter in a directory, and check it against the model and the plan.

        Raises:
            CheckpointError: a file is missing or damaged, or is for a model of another shape.
            PlanError: it was made for another plan.
            UnsupportedModel: it is not plain LoRA.
        """
        return Adapter.made_for(path, self.config, plan)


def _programs() -> dict[str, str]:
    """Return the version of every program that a measurement depends on."""
    return {
        "cqil-dist": f"{version('cqil-dist')}+{MEASUREMENT_VERSION}",
        **{name: version(name) for name in ("torch", "transformers")},
    }
