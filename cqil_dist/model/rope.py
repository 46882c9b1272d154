"""Rotary position embedding (RoFormer, arXiv 2104.09864) with the half-split layout of Llama."""

from __future__ import annotations

import torch
from torch import Tensor

from cqil_dist.model.config import ModelConfig


class RotaryTable:
    """The cosines and sines for every position of a cache of `max_len` tokens.

    The sines' first half carries the minus sign of "rotate half", so that a rotation is
    x * cos + swap_halves(x) * sin.
    """

    def __init__(
        self, config: ModelConfig, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32)
        angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inv_freq
        cos, sin = angles.cos() * config.rope_scale, angles.sin() * config.rope_scale
        self.cos_LE = torch.cat((cos, cos), dim=-1).to(device, dtype)
        self.sin_LE = torch.cat((-sin, sin), dim=-1).to(device, dtype)

    def at(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of these positions, each [N, 1, head_dim]."""
        return self.cos_LE[positions_N].unsqueeze(1), self.sin_LE[positions_N].unsqueeze(1)


def rotate(x_NHE: Tensor, cos_N1E: Tensor, sin_N1E: Tensor) -> Tensor:
    """Rotate N tokens' heads [N, H, head_dim] to their positions."""
    swapped = x_NHE.roll(x_NHE.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_NHE * cos_N1E, swapped, sin_N1E)
