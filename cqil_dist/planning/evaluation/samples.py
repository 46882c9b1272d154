"""Greedy completions of a few prompts, to read two models' side by side."""

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
    """A prompt, and how both models complete it."""

    prompt: str
    original: str
    other: str


@torch.inference_mode()
def completion(measured_model: MeasuredModel, prompt: str) -> str:
    """Return how the model, as it is now, goes on after a prompt."""
    tokenizer = measured_model.tokenizer
    ids: Any = tokenizer(prompt)["input_ids"]
    prompt_1T = torch.tensor([ids], device=measured_model.device)
    output_1T = measured_model.model.generate(
        prompt_1T,
        attention_mask=torch.ones_like(prompt_1T),
        max_new_tokens=_COMPLETION_TOKENS,
        do_sample=False,
    )
    return str(tokenizer.decode(output_1T[0, len(ids) :], skip_special_tokens=True))
