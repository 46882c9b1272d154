"""What loading asks of a model's files, whatever their format.

`cqil_dist.model.checkpoint` reads safetensors behind this interface. A reader of another format
names its tensors as Hugging Face does, and, where it stores blocks that a weight format keeps as
they are, offers them beside the floats.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TensorReader(Protocol):
    """A reader of tensors by name while a model's files are open."""

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor:
        """Read one tensor, or its part in `rows` or in `columns`, in a floating-point dtype.

        Args:
            name: the tensor's name in full, as in `model.layers.3.self_attn.q_proj.weight`.
            shape: the whole tensor's expected shape.

        Raises:
            CheckpointError: the tensor is missing, has another shape, or cannot be read.
        """
        ...
