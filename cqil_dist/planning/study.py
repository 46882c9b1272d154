"""One model, the text it is measured on, and what has been measured: kept, so that it is not again.

Under the cache directory, for each model by its content:

    plans/<model>/sampled-*.pt           text that the model said
    plans/<model>/sensitivity-*.jsonl    groups measured on a text
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cqil_dist.model.adapter import Adapter
from cqil_dist.model.cache_entry import cache_dir
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.store import resolve
from cqil_dist.model.tokenizer import load_tokenizer
from cqil_dist.planning.grouped_model import load_model
from cqil_dist.planning.original import Original
from cqil_dist.planning.sensitivity import candidates, measure_sensitivities
from cqil_dist.planning.texts import Windows, read_windows, sample_windows
from cqil_dist.progress import Progress
from cqil_dist.recommended import plan_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cqil_dist.plan import Group, Plan, PlanSource

# Of a weight file: enough to tell two models apart, and read at once.
_HEAD_BYTES = 1 << 20


@dataclass(frozen=True)
class Study:
    """A model that is measured.

    Attributes:
        name: what the user calls it.
        device: where it is computed.
    """

    name: str
    path: Path
    device: torch.device
    progress: Progress

    @classmethod
    def of(cls, name: str, device: str, progress: Progress) -> Study:
        """Fetch the model if need be.

        Args:
            device: "cpu", "cuda", or "auto": CUDA where there is a GPU.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(name, resolve(name, progress), torch.device(device), progress)

    @cached_property
    def num_layers(self) -> int:
        return ModelConfig.from_directory(self.path).num_layers

    def plan(self, source: PlanSource) -> Plan:
        """Raises PlanError where there is no such plan for this model."""
        return plan_for(source, self.name, self.num_layers)

    @cached_property
    def model(self) -> PreTrainedModel:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return load_model(self.path, dtype, self.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path)

    @cached_property
    def folder(self) -> Path:
        """Where what is measured of this model is kept."""
        content = hashlib.sha256()
        for file in sorted([self.path / "config.json", *self.path.glob("*.safetensors")]):
            content.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                content.update(stream.read(_HEAD_BYTES))
        return cache_dir() / "plans" / content.hexdigest()[:16]

    def windows(self, files: Sequence[Path], length: int, tokens: int, seed: int) -> Windows:
        """Calibration text: of these files, or where there are none, of the model's own.

        Raises:
            TextError: the files cannot be read, or hold too little.
        """
        count = max(1, tokens // length)
        if files:
            return read_windows(files, self.tokenizer, length, count, seed)
        kept = self.folder / f"sampled-{length}x{count}-{seed}-{self.device.type}.pt"
        if not kept.is_file():
            sampled = sample_windows(self.model, self.tokenizer, length, count, seed, self.progress)
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(sampled.token_ids_WT, kept)
        ids_WT = torch.load(kept, weights_only=True)
        return Windows(ids_WT, f"sampled from the model, seed {seed}")

    def original(self, windows: Windows) -> Original:
        return Original(self.model, windows, self.progress)

    def sensitivities(self, original: Original, largest: int) -> dict[Group, float]:
        """Of every group of 2 to `largest` layers, each measured once for a text."""
        known = self.folder / f"sensitivity-{original.windows.digest}-{self.device.type}.jsonl"
        groups = list(candidates(original.num_layers, largest))
        return measure_sensitivities(original, groups, known, self.progress)


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add an adapter's changes to a model's weights.

    Raises:
        CheckpointError: it was made for a model of another shape.
    """
    for name, parameter in model.named_parameters():
        if (change := adapter.change(name)) is not None:
            parameter += change.to(parameter.device, parameter.dtype)
