"""One weight matrix and its bias, as torch multiplies by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cqil_dist.model.formats import FloatFormat, FloatMatrix


@dataclass(frozen=True)
class Projection:
    """The affine map y = x W^T + b.

    Attributes:
        weight: W, [O outputs, I inputs].
        bias_O: b, or None.
    """

    weight: FloatMatrix
    bias_O: Tensor | None = None

    @classmethod
    def empty(
        cls, outputs: int, inputs: int, bias: bool, weights: FloatFormat, device: torch.device
    ) -> Projection:
        """Make room for a projection whose bias is zero until it is written."""
        bias_O = torch.zeros(outputs, dtype=weights.dtype, device=device) if bias else None
        return cls(weights.empty(outputs, inputs, device), bias_O)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """Return the projected tokens, [N, O]."""
        if self.bias_O is None:
            return torch.mm(x_NI, self.weight.weight_IO)
        return torch.addmm(self.bias_O, x_NI, self.weight.weight_IO)

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory it takes."""
        return self.weight.nbytes + (0 if self.bias_O is None else self.bias_O.nbytes)
