"""Lazy reading of safetensors checkpoints: only the tensors, rows and columns that are asked for.

This module knows Hugging Face's file layout and Llama's tensor names, and nothing of ranks. Every
damaged, missing or misshapen tensor is reported by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cqil_dist.errors import CheckpointError
from cqil_dist.model.adapter import Adapter

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_tensor(layer: int, part: str) -> str:
    """Return the full name of a layer's tensor, as `model.layers.3.self_attn.q_proj.weight`."""
    return f"model.layers.{layer}.{part}"


class Checkpoint:
    """The safetensors files of a model directory, with an adapter merged into what is read.

    Args:
        path: the model directory.
        adapter: a LoRA adapter, whose changes are added to the tensors as they are read.

    Raises:
        CheckpointError: there is no safetensors file, one is missing, or one cannot be read.
    """

    def __init__(self, path: Path, adapter: Adapter | None = None) -> None:
        self.path = path
        self.adapter = adapter
        self._files = _locate_tensors(path)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @contextmanager
    def open(self) -> Iterator[SafetensorsReader]:
        """Open a reader of tensors, whose memory maps are released at the end of the block.

        Pages of a mapped file count as the process's memory. A caller that reads layer by layer
        should open the checkpoint once for each, to hold the pages of one layer at most.
        """
        with ExitStack() as stack:
            yield SafetensorsReader(self, stack)

    def file_of(self, name: str) -> Path:
        """Return the path of the file that holds a tensor. Raises CheckpointError if none does."""
        try:
            return self._files[name]
        except KeyError:
            raise CheckpointError(
                f"tensor {name} is missing from the checkpoint in {self.path} "
                f"({len(self._files)} tensors); is the download complete?"
            ) from None


class SafetensorsReader:
    """The `TensorReader` of a checkpoint's files, valid within the block of `Checkpoint.open`."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self._checkpoint = checkpoint
        self._stack = stack
        self._handles: dict[Path, Any] = {}

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor:
        """Read one tensor, or the part of it in `rows` or else in `columns`.

        Args:
            name: the tensor's full name.
            shape: the expected shape of the whole tensor.

        Returns:
            The tensor in the checkpoint's own dtype, or in float32 if the adapter changes it.

        Raises:
            CheckpointError: the tensor is missing, cannot be read, has another shape, or does not
                hold floating-point numbers of 16 bits or more.
        """
        path = self._checkpoint.file_of(name)
        try:
            stored = self._handle(path).get_slice(name)
            found = tuple(stored.get_shape())
            if found != shape:
                raise CheckpointError(
                    f"tensor {name} in {path} has shape {list(found)} but the model's config "
                    f"asks for {list(shape)}"
                )
            if rows is not None:
                stored_part = stored[rows.start : rows.stop]
            elif columns is not None:
                stored_part = stored[:, columns.start : columns.stop]
            else:
                stored_part = stored[:]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read tensor {name} from {path}: {error}") from error
        tensor: Tensor = stored_part
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise CheckpointError(
                f"tensor {name} in {path} has dtype {tensor.dtype}; weights must be float32, "
                "float16 or bfloat16"
            )
        adapter = self._checkpoint.adapter
        if adapter is not None and (change := adapter.delta(name, rows, columns)) is not None:
            return tensor.float() + change
        return tensor

    def _handle(self, path: Path) -> Any:
        if path not in self._handles:
            self._handles[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._handles[path]


def _locate_tensors(path: Path) -> dict[str, Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = set(weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from error
        if missing := sorted(shard for shard in shards if not (path / shard).is_file()):
            raise CheckpointError(f"{index} names {', '.join(missing)}, absent from {path}")
        return {name: path / file for name, file in weight_map.items()}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"no .safetensors file in {path}")
    located: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                located |= dict.fromkeys(handle.keys(), file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or damaged: {error}") from error
    return located
