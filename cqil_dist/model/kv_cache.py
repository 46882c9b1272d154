"""Keys and values of past tokens, in slots of fixed length, one cache per stage on a rank."""

from __future__ import annotations

import torch
from torch import Tensor

from cqil_dist.model.step import AttentionRun


class KVCache:
    """Keys and values of `kv_heads` heads for `slots` sequences of up to `max_len` tokens.

    Positions a sequence has not written are zero: attention multiplies what its mask leaves out by
    a weight of zero, and NaN, of a fresh page or of an earlier sequence that overflowed, would
    survive that. A slot is cleared for its next sequence as far as the last one went.
    """

    def __init__(
        self,
        slots: int,
        kv_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.kv_heads = kv_heads
        self._lengths = [0] * slots
        self.data_SKLE = torch.zeros(
            slots, 2 * kv_heads, max_len, head_dim, dtype=dtype, device=device
        )

    def append(self, run: AttentionRun, kv_NKE: Tensor) -> None:
        """Store a run's new keys and values, [B * count, 2 * kv_heads, head_dim]."""
        for slot, start in zip(run.slots, run.starts, strict=True):
            if start == 0:
                self.data_SKLE[slot, :, : self._lengths[slot]] = 0
            self._lengths[slot] = start + run.count
        if run.batch == 1:
            target = self.data_SKLE[run.slots[0], :, run.starts[0] : run.length]
            target.copy_(kv_NKE.transpose(0, 1))
        else:  # only single tokens are batched: one position a sequence
            self.data_SKLE[run.slots_B, :, run.starts_B] = kv_NKE

    def view(self, run: AttentionRun, first: int, heads: range) -> tuple[Tensor, Tensor]:
        """Keys and values of `heads` from `first` on, each [B, len(heads), length, head_dim]."""
        cached = self.data_SKLE[run.slot_index, :, first : run.length]
        keys = cached[:, heads.start : heads.stop]
        values = cached[:, self.kv_heads + heads.start : self.kv_heads + heads.stop]
        return keys, values

    @property
    def nbytes(self) -> int:
        return self.data_SKLE.nbytes
