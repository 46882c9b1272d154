"""Random adapters for tiny models."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.tiny_models import TinyModel

from cqil_dist.model.adapter import Lora, write_adapter
from cqil_dist.model.checkpoint import layer_tensor


def random_adapter(path: Path, model: TinyModel, rank: int = 3, plan: str = "P2 S0 E6 D1") -> Path:
    """Write an adapter that changes every projection of every layer far more than rounding does."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    changes = {
        layer_tensor(layer, part): Lora(random(rank, inner), random(out, rank))
        for layer in range(model.config.num_layers)
        for part, (out, inner) in model.config.projection_shapes.items()
    }
    write_adapter(path, changes, str(model.path), model.plan(plan).to_json())
    return path
