"""Text to measure plans on: windows of tokens, from files or sampled from the model itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cqil_dist.errors import TextError
from cqil_dist.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Windows:
    """Text, cut into W windows of T tokens.

    Attributes:
        token_ids_WT: int64.
        source: what it was taken from, for people.
        files: checksums of the files it was taken from.
    """

    token_ids_WT: Tensor
    source: str
    files: frozenset[str] = frozenset()

    @property
    def tokens(self) -> int:
        return self.token_ids_WT.numel()

    @cached_property
    def digest(self) -> str:
        """Of the tokens: what was measured on them can be found again."""
        shape = str(tuple(self.token_ids_WT.shape)).encode()
        return hashlib.sha256(shape + self.token_ids_WT.numpy().tobytes()).hexdigest()[:16]

    def mixed_with(self, other: Windows, seed: int) -> Windows:
        """The windows of both, in an order that follows from the seed."""
        both_WT = torch.cat([self.token_ids_WT, other.token_ids_WT])
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(both_WT), generator=generator)
        source = f"{self.source}, {other.source}"
        return Windows(both_WT[order], source, self.files | other.files)

    def split(self, held_out: int) -> tuple[Windows, Windows]:
        """All but the last `held_out` windows, and those. Raises TextError if none are left."""
        if (kept := len(self.token_ids_WT) - held_out) < 1:
            raise TextError(
                f"there are {len(self.token_ids_WT)} windows of text, of which {held_out} are to "
                "be held out; give more text, or hold out less"
            )
        return (
            replace(self, token_ids_WT=self.token_ids_WT[:kept]),
            replace(self, token_ids_WT=self.token_ids_WT[kept:]),
        )


def read_windows(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None = None,
    seed: int = 0,
) -> Windows:
    """Windows of text files, none overlapping another.

    Args:
        length: tokens of a window.
        count: take so many, at random; None takes all, in order.

    Raises:
        TextError: a file cannot be read, or there is not enough text.
    """
    texts: list[str] = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"cannot read text from {path}: {error}") from error
    rows: list[Tensor] = []
    for text in texts:
        ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(ids) // length
        rows.append(torch.tensor(ids[: whole * length], dtype=torch.long).view(whole, length))
    windows = torch.cat(rows)
    needed = 1 if count is None else count
    if len(windows) < needed:
        raise TextError(
            f"{', '.join(map(str, paths))} hold {len(windows)} windows of {length} tokens but "
            f"{needed} are needed; give more text, or ask for less"
        )
    if count is not None:
        generator = torch.Generator().manual_seed(seed)
        windows = windows[torch.randperm(len(windows), generator=generator)[:count]]
    checksums = frozenset(hashlib.sha256(text.encode()).hexdigest() for text in texts)
    return Windows(windows, ", ".join(path.name for path in paths), checksums)


@dataclass(frozen=True)
class Openings:
    """What windows begin with that a model goes on from, so that they are of many kinds.

    A token taken at random, as in LLM-QAT (arXiv 2305.17888). Where there is a text, every second
    window begins with a stretch of it in place of that, half a window at most: what the model says
    then is of the text's kind.

    Attributes:
        tokens_N: to take one of.
        text: to take stretches of.
    """

    tokens_N: Tensor
    text: Windows | None = None

    @classmethod
    def ordinary(
        cls, vocab_size: int, tokenizer: PreTrainedTokenizerBase, text: Windows | None = None
    ) -> Openings:
        """With every token that is not a special one."""
        special = set(tokenizer.all_special_ids)
        return cls(torch.tensor([i for i in range(vocab_size) if i not in special]), text)

    @cached_property
    def digest(self) -> str:
        text = "" if self.text is None else self.text.digest
        return hashlib.sha256(self.tokens_N.numpy().tobytes() + text.encode()).hexdigest()[:16]

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Begun windows [count, length]; -1 from where the model is to go on."""
        begun_WT = torch.full((count, length), -1)
        begun_WT[:, 0] = self.tokens_N[_integers(len(self.tokens_N), count, generator)]
        if self.text is not None:
            text_WT = self.text.token_ids_WT
            for window_T in begun_WT[::2]:
                row = _integers(len(text_WT), 1, generator)[0]
                tokens = 1 + int(_integers(length // 2, 1, generator))
                first = int(_integers(text_WT.shape[1] - tokens + 1, 1, generator))
                window_T[:tokens] = text_WT[row, first : first + tokens]
        return begun_WT


def sample_windows(
    model: PreTrainedModel,
    openings: Openings,
    length: int,
    count: int,
    seed: int,
    progress: Progress,
    at_once: int,
    begun: int = 0,
) -> Iterator[Tensor]:
    """Windows [B, T] that the model itself says, at temperature 1, batch after batch.

    None ends before it is full.

    Args:
        at_once: windows of a batch; what is said follows from it too.
        begun: windows that are there already, of whole batches; the others follow from the seed.
    """
    with progress.task("Sampling text", (count - begun) * length, "tokens") as task:
        for first in range(begun, count, at_once):
            batch = min(at_once, count - first)
            generator = torch.Generator().manual_seed(seed + 1_000_003 * first)
            window_BT = openings.draw(batch, length, generator)
            with torch.inference_mode():
                cache: Any = None
                for at in range(1, length):
                    said_B1 = window_BT[:, at - 1 : at].to(model.device)
                    output = model(said_B1, cache=cache, use_cache=True)
                    cache = output.cache
                    drawn_B = _drawn(output.logits[:, -1].float(), generator)
                    given_B = window_BT[:, at]
                    window_BT[:, at] = torch.where(given_B < 0, drawn_B, given_B)
                    task.advance(batch)
                task.advance(batch)
            yield window_BT


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
