"""Text and a tiny model, loaded as the commands load it, for tests of planning."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import torch
from helpers.tiny_models import TinyModel, random_tokens
from transformers import PreTrainedModel

from cqil_dist.model.adapter import Adapter, Lora
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.reference import ReferenceModel
from cqil_dist.plan import Plan
from cqil_dist.planning.measure.compute_config import ComputeConfig
from cqil_dist.planning.measure.grouped_model import load_model
from cqil_dist.planning.measure.measured_model import MeasuredModel
from cqil_dist.planning.measure.windows import Windows
from cqil_dist.planning.recover.compensation import Compensation
from cqil_dist.progress import Progress, SilentProgress

TEXT = "The harbour lies by the sea, and every morning the keeper buys bread. " * 30


def measured_model(tiny: TinyModel, progress: Progress | None = None) -> MeasuredModel:
    return MeasuredModel.of(str(tiny.path), ComputeConfig("cpu"), progress or SilentProgress())


def fresh(tiny: TinyModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(tiny.path, dtype, torch.device("cpu"))


def random_windows(count: int, seed: int, length: int = 32) -> Windows:
    rows = [random_tokens(length, 1000 * seed + row) for row in range(count)]
    return Windows(torch.tensor(rows), "random")


def fitted_loras(fitting: Compensation, plan: Plan) -> dict[str, Lora]:
    """The changes that compensate a plan, by module."""
    with fitting.applied(plan.changed) as merged:
        return merged.loras


HELD_OUT = random_windows(4, 2)


def held_out_kl(tiny: TinyModel, plan: str, adapter: Path | None) -> float:
    """KL divergence on held-out text by the reference model, which knows no peft."""
    checkpoint = Checkpoint(tiny.path, None if adapter is None else Adapter(adapter))
    changed_model = ReferenceModel(tiny.config, checkpoint, tiny.plan(plan))
    kls = []
    for tokens in HELD_OUT.token_ids_WT.tolist():
        original = tiny.original_logits(tokens).log_softmax(-1)
        changed = changed_model.logits(tokens).log_softmax(-1)
        kls.append(float((original.exp() * (original - changed)).sum(-1).mean()))
    return fmean(kls)
