"""What a model says after some prompts, greedily: two models' answers are read side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cqil_dist.planning.measure.measured_model import MeasuredModel

PROMPTS = (
    "The capital of France is",
    "Once upon a time, a lighthouse keeper",
    "To make bread, you first",
    "Water boils at a temperature of",
)
_COMPLETION_TOKENS = 40


@dataclass(frozen=True)
class Sample:
    """What both models say after a prompt."""

    prompt: str
    original: str
    other: str


@torch.inference_mode()
def completion(measured: MeasuredModel, prompt: str) -> str:
    """Of the measured model as it is now."""
    ids: Any = measured.tokenizer(prompt)["input_ids"]
    given = torch.tensor([ids], device=measured.device)
    said = measured.model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=_COMPLETION_TOKENS,
        do_sample=False,
    )
    text = measured.tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True)
    return str(text)
