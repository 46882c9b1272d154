"""Keys and values of past tokens, in slots of fixed length."""

from __future__ import annotations

import torch
from torch import Tensor

from cqil_dist.model.step import AttentionRun, VisibleKeys


class KVCache:
    """A cache of `kv_heads` heads' keys and values: `slots` sequences of up to `max_len` tokens.

    Positions that a sequence has not written are zero: attention multiplies what its mask leaves
    out by a weight of zero, and NaN, of a fresh page or of an earlier sequence that overflowed,
    would survive that.
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
        self.data_SKLE = torch.zeros(
            slots, 2 * kv_heads, max_len, head_dim, dtype=dtype, device=device
        )

    def clear(self, slot: int, length: int) -> None:
        """Forget the first `length` positions of a slot, which another sequence wrote."""
        self.data_SKLE[slot, :, :length] = 0

    def append(self, run: AttentionRun, kv_NKE: Tensor) -> None:
        """Store a run's new keys and values, [B * count, 2 * kv_heads, head_dim]."""
        if run.target is not None:
            self.data_SKLE[run.target].copy_(kv_NKE.transpose(0, 1))
        else:  # only single tokens are batched: one position a sequence
            self.data_SKLE[run.slots_B, :, run.starts_B] = kv_NKE

    def read(self, visible: VisibleKeys, heads: range) -> tuple[Tensor, Tensor]:
        """Return some heads' visible keys and values, each [B, len(heads), positions, head_dim]."""
        cached = self.data_SKLE[visible.index]
        keys = cached[:, heads.start : heads.stop]
        values = cached[:, self.kv_heads + heads.start : self.kv_heads + heads.stop]
        return keys, values

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory it takes."""
        return self.data_SKLE.nbytes
