"""Text in windows of tokens, to measure plans on: read from files."""

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
from cqil_dist.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters that are tokenised at a time: a tokenizer takes a hundred bytes of memory for each.
_BLOCK = 1 << 21


@dataclass(frozen=True)
class Windows:
    """A text that is cut into W windows of T tokens.

    Attributes:
        token_ids_WT: token ids, int64.
        source: where the text is from, in words.
        checksums: SHA-256 of each text file that the windows are from.
    """

    token_ids_WT: Tensor
    source: str
    checksums: frozenset[str] = frozenset()

    @property
    def tokens(self) -> int:
        return self.token_ids_WT.numel()

    def to_json(self) -> dict[str, Any]:
        return {"text": self.source, "tokens": self.tokens, "window": self.token_ids_WT.shape[1]}

    @cached_property
    def digest(self) -> str:
        """Return the tokens' checksum, by which measurements on them are found again."""
        shape = str(tuple(self.token_ids_WT.shape)).encode()
        return hashlib.sha256(shape + self.token_ids_WT.numpy().tobytes()).hexdigest()[:16]

    def mixed_with(self, other: Windows, seed: int) -> Windows:
        """Return the windows of both texts, shuffled by the seed."""
        both_WT = torch.cat([self.token_ids_WT, other.token_ids_WT])
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(both_WT), generator=generator)
        source = f"{self.source}, {other.source}"
        return Windows(both_WT[order], source, self.checksums | other.checksums)

    def split(self, held_out: int) -> tuple[Windows, Windows]:
        """Return the first windows and the last `held_out`. Raises TextError if none come first."""
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
    progress: Progress | None = None,
) -> Windows:
    """Read windows of text files that do not overlap.

    Each starts with the tokenizer's leading tokens, as every prompt does in the runtime: attention
    relies on them.

    Args:
        length: tokens of a window.
        count: how many windows to choose at random; None takes all of them, in order.
        seed: of the random choice.

    Raises:
        TextError: a file cannot be read, or there is not enough text.
    """
    texts: list[str] = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"cannot read text from {path}: {error}") from error
    leading = torch.tensor(leading_tokens(tokenizer), dtype=torch.long)
    cut_WT = _cut(texts, tokenizer, length - len(leading), progress or SilentProgress())
    windows_WT = torch.cat([leading.expand(len(cut_WT), -1), cut_WT], 1)
    needed = 1 if count is None else count
    if len(windows_WT) < needed:
        raise TextError(
            f"{', '.join(map(str, paths))} hold {len(windows_WT)} windows of {length} tokens but "
            f"{needed} are needed; give more text, or ask for less"
        )
    if count is not None:
        generator = torch.Generator().manual_seed(seed)
        windows_WT = windows_WT[torch.randperm(len(windows_WT), generator=generator)[:count]]
    checksums = frozenset(hashlib.sha256(text.encode()).hexdigest() for text in texts)
    return Windows(windows_WT, ", ".join(path.name for path in paths), checksums)


def _cut(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, progress: Progress
) -> Tensor:
    """Cut texts into rows of `length` tokens; drop a block's last tokens that fill no row."""
    blocks = [block for text in texts for block in _blocks(text)]
    rows_WT = [torch.empty(0, length, dtype=torch.long)]
    with progress.task("Reading text", len(blocks), "blocks") as task:
        for block in blocks:
            ids: Any = tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
            whole = len(ids) // length * length
            rows_WT.append(torch.tensor(ids[:whole], dtype=torch.long).view(-1, length))
            task.advance()
    return torch.cat(rows_WT)


def _blocks(text: str) -> Iterator[str]:
    """Yield a text in blocks that end with a line, or within a line longer than a block."""
    start = 0
    while start < len(text):
        end = start + _BLOCK
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before every text; some have none."""
    ids: Any = tokenizer("")["input_ids"]
    return list(ids)
