"""How a model is computed where it is measured: plain, checked values; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from cqil_dist.errors import ConfigError

_VALUES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
    "matmul_precision": ("highest", "high", "medium"),
}

# torch takes 64 bits, and runs add numbers of their own: of a batch, of an epoch.
MAX_SEED = 2**32


@dataclass(frozen=True)
class ComputeConfig:
    """How to compute.

    Attributes:
        device: "cpu", "cuda", or "auto": CUDA where there is a GPU.
        dtype: of the model: "float32", "bfloat16", or "auto": float32 on a CPU, bfloat16 on a GPU.
        matmul_precision: of float32 products: "highest", "high" or "medium", as
            `torch.set_float32_matmul_precision` takes it.
    """

    device: str = "auto"
    dtype: str = "auto"
    matmul_precision: str = "highest"

    def __post_init__(self) -> None:
        for name, values in _VALUES.items():
            if (value := getattr(self, name)) not in values:
                raise ConfigError(f"{name} {value!r} is not one of {', '.join(values)}")
