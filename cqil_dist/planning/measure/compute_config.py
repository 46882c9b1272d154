"""How a model is computed where it is measured: plain, checked values; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from cqil_dist.errors import ConfigError
from cqil_dist.settings import check_settings, one_of, setting

# torch takes 64 bits, and runs add numbers of their own: of a batch, of an epoch.
MAX_SEED = 2**32


@dataclass(frozen=True)
class ComputeConfig:
    """The settings with which a model is computed in one process.

    Raises:
        ConfigError: naming the field, its value and the rule.
    """

    device: str = setting(
        "auto",
        "Device to compute on; auto takes CUDA where there is a GPU.",
        one_of("auto", "cpu", "cuda"),
    )
    dtype: str = setting(
        "auto",
        "Type of the model's weights; auto is float32 on a CPU, bfloat16 on a GPU.",
        one_of("auto", "float32", "bfloat16"),
    )
    matmul_precision: str = setting(
        "highest",
        "Precision of float32 products, as torch names it; high and medium are faster where the "
        "processor has TF32 (GPUs) or bfloat16 (CPUs with AMX).",
        one_of("highest", "high", "medium"),
    )

    def __post_init__(self) -> None:
        check_settings(self, ConfigError)
