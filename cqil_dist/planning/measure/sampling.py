"""Text sampled from the model itself, to measure plans on, fit adapters to and train them with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cqil_dist.model.config import ModelConfig
from cqil_dist.planning.measure.windows import Windows, leading_tokens
from cqil_dist.progress import Progress, Task
from cqil_dist.records import whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Windows that are sampled together: fewer where their keys and values would not fit this memory.
_WINDOWS_AT_ONCE = 128
_BYTES_AT_ONCE = 4 << 30


@dataclass(frozen=True)
class SeedPrompts:
    """The varied beginnings from which a model is sampled.

    A beginning is one random token, as in LLM-QAT (arXiv 2305.17888). Given a text, every second
    beginning is a random excerpt of it instead, half a window long at most, so that the model
    goes on in the style of that text. The tokenizer's leading tokens come before either.

    Attributes:
        tokens_N: the tokens that a random one is chosen from.
        leading: the tokens that every window starts with, the text's own windows included.
        text: the text that excerpts are taken from, if any.
    """

    tokens_N: Tensor
    leading: tuple[int, ...] = ()
    text: Windows | None = None

    @classmethod
    def ordinary(
        cls, vocab_size: int, tokenizer: PreTrainedTokenizerBase, text: Windows | None = None
    ) -> SeedPrompts:
        """Make prompts of every token that is not special, or of a text's excerpts."""
        special = set(tokenizer.all_special_ids)
        ordinary = torch.tensor([i for i in range(vocab_size) if i not in special])
        return cls(ordinary, tuple(leading_tokens(tokenizer)), text)

    @cached_property
    def digest(self) -> str:
        """Return the checksum of everything that the prompts are drawn from."""
        parts = [self.tokens_N.numpy().tobytes(), torch.tensor(self.leading).numpy().tobytes()]
        if self.text is not None:
            parts.append(self.text.digest.encode())
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Draw windows [count, length] of their prompts, and -1 where the model is to go on."""
        prompts_WT = torch.full((count, length), -1)
        first = len(self.leading)
        prompts_WT[:, :first] = torch.tensor(self.leading, dtype=torch.long)
        prompts_WT[:, first] = self.tokens_N[_integers(len(self.tokens_N), count, generator)]
        if self.text is not None:
            text_WT = self.text.token_ids_WT[:, first:]
            for window_T in prompts_WT[::2, first:]:
                row = _integers(len(text_WT), 1, generator)[0]
                tokens = 1 + int(_integers(max(1, len(window_T) // 2), 1, generator))
                start = int(_integers(text_WT.shape[1] - tokens + 1, 1, generator))
                window_T[:tokens] = text_WT[row, start : start + tokens]
        return prompts_WT


def sampled_windows(
    model: PreTrainedModel,
    config: ModelConfig,
    seed_prompts: SeedPrompts,
    length: int,
    count: int,
    seed: int,
    folder: Path,
    numerics: str,
    progress: Progress,
) -> Windows:
    """Sample windows [count, length] from the model at temperature 1, past any end token.

    Every batch is written to a file once it is complete, so that interrupted sampling resumes.

    Args:
        folder: the model's folder in the cache.
        numerics: names the device, dtype and precision, on which the samples depend.
    """
    kv_values = 2 * config.num_layers * config.num_kv_heads * config.head_dim * length
    fitting = _BYTES_AT_ONCE // (kv_values * model.dtype.itemsize)
    at_once = max(1, min(_WINDOWS_AT_ONCE, fitting))
    settings = f"{length}x{count}-{at_once}-{seed}-{seed_prompts.digest}-{numerics}"
    cached = folder / f"sampled-{settings}.pt"
    ids_WT = torch.empty(0, length, dtype=torch.long)
    if cached.is_file():
        ids_WT = torch.load(cached, weights_only=True)
    source = f"sampled from the model, seed {seed}"
    if (missing := count - len(ids_WT)) <= 0:
        return Windows(ids_WT, source)
    with progress.task("Sampling text", missing * length, "tokens") as task:
        for first in range(len(ids_WT), count, at_once):
            generator = torch.Generator().manual_seed(seed + 1_000_003 * first)
            prompts_BT = seed_prompts.draw(min(at_once, count - first), length, generator)
            ids_WT = torch.cat([ids_WT, _completed(model, prompts_BT, generator, task)])
            with whole_file(cached) as file:
                torch.save(ids_WT, file)
    return Windows(ids_WT, source)


@torch.inference_mode()
def _completed(
    model: PreTrainedModel, prompts_BT: Tensor, generator: torch.Generator, task: Task
) -> Tensor:
    """Return full windows [B, T]: the prompts, and what the model goes on with."""
    sampled_BT = prompts_BT.clone()
    cache: Any = None
    for at in range(1, sampled_BT.shape[1]):
        last_B1 = sampled_BT[:, at - 1 : at].to(model.device)
        output = model(last_B1, cache=cache, use_cache=True)
        cache = output.cache
        drawn_B = _drawn(output.logits[:, -1].float(), generator)
        sampled_BT[:, at] = torch.where(prompts_BT[:, at] < 0, drawn_B, prompts_BT[:, at])
        task.advance(len(sampled_BT))
    task.advance(len(sampled_BT))
    return sampled_BT


def _integers(below: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(below, (count,), generator=generator)


def _drawn(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token of each row's distribution, [B], at temperature 1.

    This takes one random number a row; `torch.multinomial` draws one for every entry of the
    vocabulary, which takes as long as the model does.
    """
    cumulative_BV = logits_BV.softmax(-1).cumsum(-1)
    random_B1 = torch.rand(len(logits_BV), 1, generator=generator).to(logits_BV.device)
    drawn_B1 = torch.searchsorted(cumulative_BV, random_B1 * cumulative_BV[:, -1:], right=True)
    return drawn_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1).cpu()
