"""How a weight matrix lies in memory: made block by block while loading, counted, and read back.

A format knows matrices and nothing of layers, files or ranks. The loader fills matrices, footprints
ask for their bytes, the reference computes with their dequantised values, and a part backend
multiplies by those of the formats that it computes (`cqil_dist.model.parts.PartBackend`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from cqil_dist.errors import CheckpointError


class Matrix(ABC):
    """A weight matrix W, [O outputs, I inputs], of y = x W^T."""

    @abstractmethod
    def write(self, block_OI: Tensor, first_output: int = 0, first_input: int = 0) -> None:
        """Store a block, given in a floating-point dtype, from this row and column of W on."""

    @abstractmethod
    def dequantised(self) -> Tensor:
        """Return W in float32, [O, I], as products use it: what storing cost is lost for good."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes of memory it takes, scales included."""


class WeightFormat(ABC):
    """A way to store matrices.

    A backend may fold the gain of the norm before a projection into the matrix where that is exact;
    the grid of a quantised file cannot take a gain up, and there it stays with the norm.

    Attributes:
        name: what users call it.
        group: values of a row that share a scale; feed-forward columns are split over ranks at its
            multiples, so that no rank holds a part of a group.
    """

    name: str
    group: int

    @abstractmethod
    def empty(self, outputs: int, inputs: int, device: torch.device) -> Matrix:
        """Make room for a matrix, to be written block by block."""

    @abstractmethod
    def nbytes(self, outputs: int, inputs: int) -> int:
        """Count the bytes that a matrix takes."""


@dataclass(frozen=True)
class FloatFormat(WeightFormat):
    """A format that stores every value by itself, in a floating-point dtype."""

    dtype: torch.dtype
    group = 1

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.dtype).removeprefix("torch.")

    def empty(self, outputs: int, inputs: int, device: torch.device) -> FloatMatrix:
        # A product with a single row is bound by memory, and on CPUs sgemv streams a wide matrix
        # up to twice as fast when it lies input-major: 20 against 11 GB/s for 576 -> 3072.
        # A tall one (1536 -> 576) is as fast, or faster, the way checkpoints store it.
        if device.type == "cpu" and outputs >= inputs:
            return FloatMatrix(torch.empty(inputs, outputs, dtype=self.dtype, device=device))
        return FloatMatrix(torch.empty(outputs, inputs, dtype=self.dtype, device=device).t())

    def nbytes(self, outputs: int, inputs: int) -> int:
        return outputs * inputs * self.dtype.itemsize


@dataclass(frozen=True)
class FloatMatrix(Matrix):
    """A matrix of plain floating-point values.

    Attributes:
        weight_IO: W transposed, [I, O]; its memory order is the format's business.
    """

    weight_IO: Tensor

    def write(self, block_OI: Tensor, first_output: int = 0, first_input: int = 0) -> None:
        outputs, inputs = block_OI.shape
        place_OI = self.weight_IO.t()[first_output:, first_input:]
        place_OI[:outputs, :inputs] = block_OI

    def dequantised(self) -> Tensor:
        return self.weight_IO.t().float()

    @property
    def nbytes(self) -> int:
        return self.weight_IO.nbytes


_FORMATS: dict[str, WeightFormat] = {
    str(dtype).removeprefix("torch."): FloatFormat(dtype)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
}


def weight_format(name: str) -> WeightFormat:
    """Return the format of this name. Raises CheckpointError where there is none."""
    try:
        return _FORMATS[name]
    except KeyError:
        known = ", ".join(_FORMATS)
        raise CheckpointError(f"weight format {name!r} is not one of {known}") from None
