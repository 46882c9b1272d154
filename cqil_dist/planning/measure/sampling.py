"""Text that a model says itself: to measure plans on, to fit and to train."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cqil_dist.model.config import ModelConfig
from cqil_dist.planning.measure.windows import Windows, first_tokens
from cqil_dist.progress import Progress, Task
from cqil_dist.records import whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Windows that are sampled at the same time, as far as their keys and values fit into so much.
_WINDOWS_AT_ONCE = 128
_BYTES_AT_ONCE = 4 << 30


@dataclass(frozen=True)
class SeedPrompts:
    """What windows begin with that a model goes on from, so that they are of many kinds.

    A token taken at random, as in LLM-QAT (arXiv 2305.17888). Where there is a text, every second
    window begins with a stretch of it in place of that, half a window at most: what the model says
    then is of the text's kind. Before either come the tokens that all texts begin with.

    Attributes:
        tokens_N: to take one of.
        first: what every window begins with, those of the text too.
        text: to take stretches of.
    """

    tokens_N: Tensor
    first: tuple[int, ...] = ()
    text: Windows | None = None

    @classmethod
    def ordinary(
        cls, vocab_size: int, tokenizer: PreTrainedTokenizerBase, text: Windows | None = None
    ) -> SeedPrompts:
        """With every token that is not a special one."""
        special = set(tokenizer.all_special_ids)
        ordinary = torch.tensor([i for i in range(vocab_size) if i not in special])
        return cls(ordinary, tuple(first_tokens(tokenizer)), text)

    @cached_property
    def digest(self) -> str:
        parts = [self.tokens_N.numpy().tobytes(), torch.tensor(self.first).numpy().tobytes()]
        if self.text is not None:
            parts.append(self.text.digest.encode())
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Begun windows [count, length]; -1 from where the model is to go on."""
        begun_WT = torch.full((count, length), -1)
        first = len(self.first)
        begun_WT[:, :first] = torch.tensor(self.first, dtype=torch.long)
        begun_WT[:, first] = self.tokens_N[_integers(len(self.tokens_N), count, generator)]
        if self.text is not None:
            text_WT = self.text.token_ids_WT[:, first:]
            for window_T in begun_WT[::2, first:]:
                row = _integers(len(text_WT), 1, generator)[0]
                tokens = 1 + int(_integers(max(1, len(window_T) // 2), 1, generator))
                start = int(_integers(text_WT.shape[1] - tokens + 1, 1, generator))
                window_T[:tokens] = text_WT[row, start : start + tokens]
        return begun_WT


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
    """Windows that the model itself says, at temperature 1. None ends before it is full.

    Kept batch after batch, so that sampling that was interrupted goes on.

    Args:
        folder: of what is kept of the model.
        numerics: how it is computed, where it makes a difference.
    """
    kv_values = 2 * config.num_layers * config.num_kv_heads * config.head_dim * length
    fitting = _BYTES_AT_ONCE // (kv_values * model.dtype.itemsize)
    at_once = max(1, min(_WINDOWS_AT_ONCE, fitting))
    drawn = f"{length}x{count}-{at_once}-{seed}-{seed_prompts.digest}"  # what is said follows from
    kept = folder / f"sampled-{drawn}-{numerics}.pt"
    ids_WT = torch.empty(0, length, dtype=torch.long)
    if kept.is_file():
        ids_WT = torch.load(kept, weights_only=True)
    source = f"sampled from the model, seed {seed}"
    if (missing := count - len(ids_WT)) <= 0:
        return Windows(ids_WT, source)
    with progress.task("Sampling text", missing * length, "tokens") as task:
        for first in range(len(ids_WT), count, at_once):
            generator = torch.Generator().manual_seed(seed + 1_000_003 * first)
            begun_BT = seed_prompts.draw(min(at_once, count - first), length, generator)
            ids_WT = torch.cat([ids_WT, _said_after(model, begun_BT, generator, task)])
            with whole_file(kept) as file:
                torch.save(ids_WT, file)
    return Windows(ids_WT, source)


@torch.inference_mode()
def _said_after(
    model: PreTrainedModel, begun_BT: Tensor, generator: torch.Generator, task: Task
) -> Tensor:
    """Begun windows, filled."""
    said_BT = begun_BT.clone()
    cache: Any = None
    for at in range(1, said_BT.shape[1]):
        last_B1 = said_BT[:, at - 1 : at].to(model.device)
        output = model(last_B1, cache=cache, use_cache=True)
        cache = output.cache
        drawn_B = _drawn(output.logits[:, -1].float(), generator)
        said_BT[:, at] = torch.where(begun_BT[:, at] < 0, drawn_B, begun_BT[:, at])
        task.advance(len(said_BT))
    task.advance(len(said_BT))
    return said_BT


def _integers(below: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(below, (count,), generator=generator)


def _drawn(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """A token [B] of each distribution, at temperature 1.

    By one random number a row: `torch.multinomial` draws one for every entry of the vocabulary,
    which takes as long as the model does.
    """
    reached_BV = logits_BV.softmax(-1).cumsum(-1)
    wanted_B1 = torch.rand(len(logits_BV), 1, generator=generator).to(logits_BV.device)
    drawn_B1 = torch.searchsorted(reached_BV, wanted_B1 * reached_BV[:, -1:], right=True)
    return drawn_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1).cpu()
