"""The two parts of a decoder layer, each wide enough for several layers at once.

The members of a concurrent group share their input, hence also its RMS: with the norms' gains
folded into the projections, the layers a rank holds of one group are one layer with more heads.
This module computes parts from tensors it is given; what they are parts of, and where partial
results meet, is the rank program's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cqil_dist.model.kv_cache import KVCache
from cqil_dist.model.projection import Projection
from cqil_dist.model.rope import rotate
from cqil_dist.model.step import AttentionRun, StepContext


def rms_norm(x_ND: Tensor, eps: float) -> Tensor:
    """x / rms(x); the norm's gain is folded into the projection that follows."""
    return F.rms_norm(x_ND, x_ND.shape[-1:], eps=eps)


@dataclass(frozen=True)
class OutputProjection:
    """Projects the attention outputs in `columns` (of all heads' outputs) back to model width."""

    columns: slice
    projection: Projection


@dataclass(frozen=True)
class AttentionPart:
    """Attention of one or more layers with the same input.

    Attributes:
        qkv: [D] -> all query heads, then all key heads, then all value heads, layer by layer.
        head_gains_HE: gains of the query and key norms (Qwen3), [query + key heads, head_dim].
        outputs: one projection a bundle; their inputs are the query heads' outputs.
        windows: (key/value heads, sliding window or None), in head order.
    """

    qkv: Projection
    head_gains_HE: Tensor | None
    outputs: tuple[OutputProjection, ...]
    windows: tuple[tuple[range, int | None], ...]
    queries_per_kv: int
    head_dim: int
    eps: float

    def __call__(self, normalized_ND: Tensor, context: StepContext, cache: KVCache) -> list[Tensor]:
        """Attention outputs of every bundle, each [N, D]; stores the new keys and values."""
        tokens = normalized_ND.shape[0]
        qkv_NHE = self.qkv(normalized_ND).view(tokens, -1, self.head_dim)
        rotated, values = qkv_NHE[:, : -cache.kv_heads], qkv_NHE[:, -cache.kv_heads :]
        if self.head_gains_HE is not None:
            rotated = rms_norm(rotated, self.eps) * self.head_gains_HE
        rotated = rotate(rotated, context.cos_N1E, context.sin_N1E)
        query_heads = rotated.shape[1] - cache.kv_heads
        queries, keys = rotated[:, :query_heads], rotated[:, query_heads:]
        kv_NKE = torch.cat((keys, values), dim=1)
        for run in context.runs:
            cache.append(run, kv_NKE[run.rows])
        attended = [
            torch.cat([self._attend(queries[run.rows], run, cache, w) for w in self.windows], dim=1)
            if len(self.windows) > 1
            else self._attend(queries[run.rows], run, cache, self.windows[0])
            for run in context.runs
        ]
        attended_NA = attended[0] if len(attended) == 1 else torch.cat(attended)
        return [output.projection(attended_NA[:, output.columns]) for output in self.outputs]

    def _attend(
        self,
        queries_NHE: Tensor,
        run: AttentionRun,
        cache: KVCache,
        window_run: tuple[range, int | None],
    ) -> Tensor:
        """Outputs [B * count, heads * head_dim] of the query heads that share one window."""
        heads, window = window_run
        first = run.first_visible(window)
        keys, values = cache.view(run, first, heads)
        mask = run.mask(window)
        group = self.queries_per_kv
        queries = queries_NHE[:, heads.start * group : heads.stop * group]
        if run.count == 1:
            # The queries that share a key head stand as one head's consecutive queries: exact
            # without a causal mask, and without repeating keys.
            folded = queries.reshape(run.batch, len(heads), group, self.head_dim)
            out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
            return out.reshape(run.batch, -1)
        # Only a prefill chunk has more than one token a sequence, and it attends by itself.
        out = F.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=mask, enable_gqa=True
        )
        return out.squeeze(0).transpose(0, 1).reshape(run.count, -1)

    @property
    def nbytes(self) -> int:
        gains = 0 if self.head_gains_HE is None else self.head_gains_HE.nbytes
        outputs = sum(output.projection.nbytes for output in self.outputs)
        return self.qkv.nbytes + gains + outputs


@dataclass(frozen=True)
class FeedForwardPart:
    """Gated SiLU feed-forward of one or more layers with the same input.

    Attributes:
        gate_up: [D] -> all gate columns, then all up columns, layer by layer.
        down: the activations of all layers -> the sum of their outputs, [D].
    """

    gate_up: Projection
    down: Projection

    def __call__(self, normalized_ND: Tensor) -> Tensor:
        gate, up = self.gate_up(normalized_ND).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes
