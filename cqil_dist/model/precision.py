"""In which numbers a model is computed, stored, cached and sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cqil_dist.errors import CheckpointError
from cqil_dist.model.formats import WeightFormat, weight_format

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """The numbers of one engine, by name: plain values, the same for all its ranks.

    torch's parts cache and send what they compute without converting it, so `kv` and `wire` are
    `compute` where they compute, as `of` has it.

    Attributes:
        compute: dtype of hidden states, biases and norms, and of all arithmetic between products.
        weights: format of the weight matrices (`cqil_dist.model.formats`).
        kv: dtype of cached keys and values.
        wire: dtype of hidden states and partial results on their way between processes.
    """

    compute: str
    weights: str
    kv: str
    wire: str

    @classmethod
    def of(cls, dtype: str) -> Precision:
        """Return a precision of one dtype throughout: "float32", "float16" or "bfloat16".

        Raises:
            CheckpointError: there is no such dtype.
        """
        parse_dtype(dtype)
        return cls(dtype, dtype, dtype, dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        return parse_dtype(self.compute)

    @property
    def weight_format(self) -> WeightFormat:
        return weight_format(self.weights)

    @property
    def kv_dtype(self) -> torch.dtype:
        return parse_dtype(self.kv)

    @property
    def wire_dtype(self) -> torch.dtype:
        return parse_dtype(self.wire)


def parse_dtype(name: str) -> torch.dtype:
    """Parse float32, float16 or bfloat16. Raises CheckpointError for any other name."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise CheckpointError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}") from None
