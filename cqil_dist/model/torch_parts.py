"""The parts of decoder layers as torch computes them: any device, any number of tokens.

The members of a group share their input, hence also its RMS: with the norms' gains folded into the
projections, the layers that a rank holds of one group are one layer with more heads.

Axes in names: N tokens of a step, D model width, B attention bundles, M feed-forward inputs, H
query heads, K key/value heads, E head width, A all query heads' outputs side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from cqil_dist.model.kv_cache import KVCache
from cqil_dist.model.projection import Projection
from cqil_dist.model.rope import rotate
from cqil_dist.model.step import AttentionRun, StepInput


def rms_norm(x_ND: Tensor, eps: float) -> Tensor:
    """Compute x / rms(x); the norm's gain is folded into the projection that follows."""
    return F.rms_norm(x_ND, x_ND.shape[-1:], eps=eps)


@dataclass(frozen=True)
class AttentionSpan:
    """A run of adjacent query heads that attend alike.

    Attributes:
        queries: the query heads, as they lie in the part.
        kv_heads: the key/value heads that they read, `queries_per_kv` queries each.
        window: how many latest positions they see; None for all.
    """

    queries: range
    kv_heads: range
    queries_per_kv: int
    window: int | None


@dataclass(frozen=True)
class TorchAttention:
    """The attention of one or more layers, or shares of layers, with the same input.

    Attributes:
        qkv: [D] -> all query heads, then all key heads, then all value heads, layer by layer.
        head_gains_HE: gains of the query and key norms (Qwen3), [query + key heads, head_dim].
        outputs: one projection a bundle, back to model width; each takes as many of the query
            heads' outputs, in their order, as it has inputs.
        spans: which heads attend together, in head order.
    """

    qkv: Projection
    head_gains_HE: Tensor | None
    outputs: tuple[Projection, ...]
    spans: tuple[AttentionSpan, ...]
    head_dim: int
    eps: float
    cache: KVCache

    def __call__(self, x_ND: Tensor, step: StepInput) -> Tensor:
        """See `AttentionPart`."""
        kv_heads = self.cache.kv_heads
        qkv_NHE = self.qkv(rms_norm(x_ND, self.eps)).view(len(x_ND), -1, self.head_dim)
        queries_keys, values = qkv_NHE[:, :-kv_heads], qkv_NHE[:, -kv_heads:]
        if self.head_gains_HE is not None:
            queries_keys = rms_norm(queries_keys, self.eps) * self.head_gains_HE
        rotated = rotate(queries_keys, step.cos_N1E, step.sin_N1E)
        queries, keys = rotated[:, :-kv_heads], rotated[:, -kv_heads:]
        kv_NKE = torch.cat((keys, values), dim=1)
        attended = [self._attend(queries[run.rows], kv_NKE[run.rows], run) for run in step.runs]
        attended_NA = attended[0] if len(attended) == 1 else torch.cat(attended)
        if len(self.outputs) == 1:
            return self.outputs[0](attended_NA).unsqueeze(0)
        widths = [len(output.weight.weight_IO) for output in self.outputs]
        bundles = zip(self.outputs, torch.split(attended_NA, widths, dim=1), strict=True)
        return torch.stack([output(attended) for output, attended in bundles])

    def _attend(self, queries_NHE: Tensor, kv_NKE: Tensor, run: AttentionRun) -> Tensor:
        """Compute one run's attention over its slots, [B * count, A], after storing `kv_NKE`."""
        self.cache.append(run, kv_NKE)
        attended: list[Tensor] = []
        for span in self.spans:
            visible = run.visible[span.window]
            keys, values = self.cache.read(visible, span.kv_heads)
            queries = queries_NHE[:, span.queries.start : span.queries.stop]
            if run.count == 1:
                # The queries that share a key head stand as one head's consecutive queries: exact
                # without a causal mask, and without repeating keys.
                shape = (run.batch, len(span.kv_heads), span.queries_per_kv, self.head_dim)
                out = F.scaled_dot_product_attention(
                    queries.reshape(shape), keys, values, attn_mask=visible.mask
                )
                attended.append(out.reshape(run.batch, -1))
            else:
                # Only a prefill chunk has more than one token a sequence, and attends by itself.
                out = F.scaled_dot_product_attention(
                    queries.transpose(0, 1).unsqueeze(0),
                    keys,
                    values,
                    attn_mask=visible.mask,
                    enable_gqa=True,
                )
                attended.append(out.squeeze(0).transpose(0, 1).reshape(run.count, -1))
        return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the weights; the cache counts for itself."""
        gains = 0 if self.head_gains_HE is None else self.head_gains_HE.nbytes
        outputs = sum(output.nbytes for output in self.outputs)
        return self.qkv.nbytes + gains + outputs


@dataclass(frozen=True)
class GatedProjections:
    """The gated SiLU feed-forward of one or more layers, or shares of layers, with the same input.

    Attributes:
        gate_up: [D] -> all gate columns, then all up columns, layer by layer.
        down: the activations of all layers -> the sum of their outputs, [D].
    """

    gate_up: Projection
    down: Projection

    @property
    def nbytes(self) -> int:
        """Return the bytes of the weights."""
        return self.gate_up.nbytes + self.down.nbytes


@dataclass(frozen=True)
class TorchFeedForward:
    """A row of feed-forward bundles side by side, each with an input of its own."""

    bundles: Sequence[GatedProjections]
    eps: float

    def __call__(self, u_MND: Tensor) -> Tensor:
        """See `FeedForwardPart`."""
        outputs: list[Tensor] = []
        for bundle, u_ND in zip(self.bundles, u_MND.unbind(), strict=True):
            gate, up = bundle.gate_up(rms_norm(u_ND, self.eps)).chunk(2, dim=-1)
            outputs.append(bundle.down(F.silu(gate) * up))
        return reduce(torch.add, outputs)
