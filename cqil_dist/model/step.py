"""One step's work: which tokens of which sequences a pass through the layers computes.

A step is a flat batch of N tokens made of segments, each a run of consecutive positions of one
sequence's KV slot. Decoding adds one token a segment, prefill a chunk of them; both may share a
step. What every layer needs of that (positions, rotary factors, masks) is worked out once here.

Axes in names: N tokens of the step, B sequences of a run, R tokens whose logits are wanted, V
vocabulary, E head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cqil_dist.model.rope import RotaryTable
from cqil_dist.timeline import RankTimeline


@dataclass(frozen=True)
class Segment:
    """The positions start .. start+count-1 of the sequence in `slot`.

    `wanted_logits` asks for next-token logits after each of the segment's last so many tokens.
    """

    slot: int
    start: int
    count: int
    wanted_logits: int


@dataclass(frozen=True)
class Step:
    """The work of one pass through the layers.

    Attributes:
        token_ids: the tokens of all segments, in order.
        plan_index: index of the plan whose groups it walks.
        argmax_only: the most likely tokens are wanted in place of the logits.
        wants_timeline: whether the ranks report where their time went.
    """

    segments: tuple[Segment, ...]
    token_ids: tuple[int, ...]
    plan_index: int = 0
    argmax_only: bool = False
    wants_timeline: bool = False


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step.

    Attributes:
        rows: one for each token after which logits are wanted, in order: float32 logits [R, V], or
            with `argmax_only` token ids, int64 [R], -1 where a logit is not a finite number.
        ranks: where each rank's time went, if the step was to report it.
    """

    rows: Tensor
    ranks: tuple[RankTimeline, ...] = ()


@dataclass(frozen=True)
class StepInput:
    """The values that the parts of every layer are told of a step, on their device.

    Everything is an array with an entry for each token, made once a step, so that a part may be
    one kernel of fixed shape. `runs` says the same of the step in the form that torch's attention
    takes.

    Attributes:
        slots_N: the token's KV slot.
        positions_N: its position in its sequence; it attends to that and all before.
        cos_N1E, sin_N1E: rotary factors of its position.
        logit_rows_R: rows of the tokens after which logits are wanted.
        runs: rows that attend together, in order.
    """

    slots_N: Tensor
    positions_N: Tensor
    cos_N1E: Tensor
    sin_N1E: Tensor
    logit_rows_R: Tensor
    runs: tuple[AttentionRun, ...]

    @classmethod
    def of(
        cls,
        segments: Sequence[Segment],
        rotary: RotaryTable,
        windows: Iterable[int | None],
        device: torch.device,
    ) -> StepInput:
        """Lay out a step of at least one segment.

        Args:
            windows: those that the model's layers have, each once; None for layers without one.
        """
        slots: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        for segment in segments:
            slots += [segment.slot] * segment.count
            positions += range(segment.start, segment.start + segment.count)
            logit_rows += range(len(positions) - segment.wanted_logits, len(positions))
        rows = torch.tensor([slots, positions], device=device)
        cos_N1E, sin_N1E = rotary.at(rows[1])
        logit_rows_R = torch.tensor(logit_rows, dtype=torch.long, device=device)
        runs = _attention_runs(segments, rows, windows)
        return cls(rows[0], rows[1], cos_N1E, sin_N1E, logit_rows_R, runs)


@dataclass(frozen=True)
class VisibleKeys:
    """The cached positions that a run attends to under one window.

    Attributes:
        index: of slots, heads (all) and positions in a cache; a view where the run's slots are
            adjacent.
        mask: what each row may attend to of them, bool [B, 1, count, positions]; None for a single
            decoded token, which sees them all.
    """

    index: tuple[slice | Tensor, slice, slice]
    mask: Tensor | None


class AttentionRun:
    """The rows of a step that attend together: B sequences with `count` new tokens each.

    Attributes:
        rows: the run's rows in the step's flat batch; B * count of them.
        slots_B, starts_B: cache slot of each sequence, and position of its first new token.
        count: new tokens of each sequence; more than one only where B is 1.
        target: of a single sequence, the index of its slot, heads (all) and new positions in a
            cache; None where there are several.
        visible: the keys that the rows see, by window (how many latest ones; None for all).
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        rows: slice,
        slots_B: Tensor,
        starts_B: Tensor,
        windows: Iterable[int | None],
    ) -> None:
        first, last = segments[0], segments[-1]
        starts = [segment.start for segment in segments]
        self.rows = rows
        self.slots_B = slots_B
        self.starts_B = starts_B
        self.batch = len(segments)
        self.count = first.count
        self.target: tuple[int, slice, slice] | None = None
        if self.batch == 1:
            self.target = (first.slot, slice(None), slice(first.start, first.start + first.count))
        adjacent = all(segment.slot == first.slot + n for n, segment in enumerate(segments))
        slots = slice(first.slot, last.slot + 1) if adjacent else slots_B
        end = max(starts) + first.count
        self.visible: dict[int | None, VisibleKeys] = {}
        for window in windows:
            begin = 0 if window is None else max(0, min(starts) + 1 - window)
            mask = None
            if self.batch > 1 or self.count > 1:
                new = torch.arange(self.count, device=starts_B.device)
                query = starts_B[:, None, None, None] + new[:, None]
                key = torch.arange(begin, end, device=starts_B.device)
                mask = key <= query
                if window is not None:
                    mask &= key > query - window
            index = (slots, slice(None), slice(begin, end))
            self.visible[window] = VisibleKeys(index, mask)


def _attention_runs(
    segments: Sequence[Segment], rows: Tensor, windows: Iterable[int | None]
) -> tuple[AttentionRun, ...]:
    """Make one run of adjacent decode segments, and one of every prefill chunk.

    Args:
        rows: slot and position of each token, [2, N].
    """
    batches: list[list[Segment]] = []
    for segment in segments:
        if segment.count == 1 and batches and batches[-1][0].count == 1:
            batches[-1].append(segment)
        else:
            batches.append([segment])
    runs: list[AttentionRun] = []
    row = 0
    for batch in batches:
        count = batch[0].count
        end = row + len(batch) * count
        slots_B, starts_B = rows[:, row:end:count]
        runs.append(AttentionRun(batch, slice(row, end), slots_B, starts_B, windows))
        row = end
    return tuple(runs)
