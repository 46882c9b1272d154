"""One step's work: which tokens of which sequences a pass through the layers computes.

A step is a flat batch of N tokens made of segments, each a run of consecutive positions of one
sequence's KV slot. Decoding adds one token a segment, prefill a chunk of them; both may share a
step. What every layer needs of that (positions, rotary factors, masks) is worked out once here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from cqil_dist.model.rope import RotaryTable
from cqil_dist.timeline import RankTimeline


@dataclass(frozen=True)
class Segment:
    """Positions start .. start+count-1 of the sequence in `slot`.

    `logits` asks for next-token logits after each of the segment's last so many tokens.
    """

    slot: int
    start: int
    count: int
    logits: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class Step:
    """What one pass through the layers computes.

    Attributes:
        token_ids: the tokens of all segments, in order.
        plan: index of the plan whose groups it walks.
        argmax_only: the most likely tokens are wanted in place of the logits.
        timeline: the ranks report where their time went.
    """

    segments: tuple[Segment, ...]
    token_ids: tuple[int, ...]
    plan: int = 0
    argmax_only: bool = False
    timeline: bool = False


@dataclass(frozen=True)
class StepResult:
    """What a step gave.

    Attributes:
        rows: one for each token after which logits are wanted, in order: float32 logits [R, V], or
            with `argmax_only` token ids, int64 [R], -1 where a logit is not a finite number.
        ranks: where each rank's time went, if the step was to report it.
    """

    rows: Tensor
    ranks: tuple[RankTimeline, ...] = ()


@dataclass
class AttentionRun:
    """Rows of a step that attend together: B sequences with `count` new tokens each.

    Attributes:
        first_row: the run's first row in the step's flat batch; it has B * count rows.
        slots: the sequences' cache slots.
        starts: position of each sequence's first new token.
        count: new tokens of each sequence.
        device: where the run's index and mask tensors live.
    """

    first_row: int
    slots: tuple[int, ...]
    starts: tuple[int, ...]
    count: int
    device: torch.device
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    @cached_property
    def slots_B(self) -> Tensor:
        return torch.tensor(self.slots, device=self.device)

    @cached_property
    def starts_B(self) -> Tensor:
        return torch.tensor(self.starts, device=self.device)

    @cached_property
    def slot_index(self) -> slice | Tensor:
        """Index of the cache's slots: a slice, hence a view, where they are adjacent."""
        first, last = self.slots[0], self.slots[-1]
        if self.slots == tuple(range(first, last + 1)):
            return slice(first, last + 1)
        return self.slots_B

    @cached_property
    def length(self) -> int:
        """Cached positions in view: those of the longest sequence."""
        return max(self.starts) + self.count

    @property
    def batch(self) -> int:
        return len(self.starts)

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.batch * self.count)

    def first_visible(self, window: int | None) -> int:
        """First cached position that any row of the run attends to."""
        return 0 if window is None else max(0, min(self.starts) + 1 - window)

    def mask(self, window: int | None) -> Tensor | None:
        """What each row may attend to: bool [B, 1, count, length - first_visible].

        None for a single decoded token, which sees all that is in view.
        """
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> Tensor | None:
        if self.batch == 1 and self.count == 1:
            return None
        query = self.starts_B[:, None] + torch.arange(self.count, device=self.device)
        key = torch.arange(self.first_visible(window), self.length, device=self.device)
        visible = key <= query[:, :, None]
        if window is not None:
            visible &= key > query[:, :, None] - window
        return visible.unsqueeze(1)


@dataclass(frozen=True)
class StepContext:
    """What every layer needs to know of a step of N tokens.

    `logit_rows` are those of its rows after which logits are wanted.
    """

    positions_N: Tensor
    cos_N1E: Tensor
    sin_N1E: Tensor
    runs: tuple[AttentionRun, ...]
    logit_rows: Tensor

    @classmethod
    def of(
        cls, segments: Sequence[Segment], rotary: RotaryTable, device: torch.device
    ) -> StepContext:
        positions = [p for segment in segments for p in range(segment.start, segment.end)]
        positions_N = torch.tensor(positions, device=device)
        cos, sin = rotary.at(positions_N)
        rows: list[int] = []
        row = 0
        for segment in segments:
            row += segment.count
            rows.extend(range(row - segment.logits, row))
        logit_rows = torch.tensor(rows, dtype=torch.long, device=device)
        return cls(positions_N, cos, sin, _attention_runs(segments, device), logit_rows)


def _attention_runs(segments: Sequence[Segment], device: torch.device) -> tuple[AttentionRun, ...]:
    """Adjacent decode segments attend as one batch, every prefill chunk by itself."""
    batches: list[list[Segment]] = []
    for segment in segments:
        if segment.count == 1 and batches and batches[-1][0].count == 1:
            batches[-1].append(segment)
        else:
            batches.append([segment])
    runs: list[AttentionRun] = []
    row = 0
    for batch in batches:
        slots = tuple(segment.slot for segment in batch)
        starts = tuple(segment.start for segment in batch)
        runs.append(AttentionRun(row, slots, starts, batch[0].count, device))
        row += len(batch) * batch[0].count
    return tuple(runs)
