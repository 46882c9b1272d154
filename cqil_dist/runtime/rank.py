"""One rank's walk through a step: from the embedded tokens to its share of the logits.

Knows the assignment, the weights of its pieces and an exchange; knows nothing of Ray, sockets,
requests or sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cqil_dist.assignment import Assignment, Round, Stage
from cqil_dist.exchange.base import Exchange, sum_in_rank_order
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.head import HeadShard
from cqil_dist.model.kv_cache import KVCache
from cqil_dist.model.layers import rms_normalize
from cqil_dist.model.loading import PartLoader, StageParts
from cqil_dist.model.rope import RotaryTable
from cqil_dist.model.step import Segment, StepContext


@dataclass(frozen=True)
class CacheShape:
    """Room for `slots` sequences of up to `max_len` tokens each."""

    slots: int
    max_len: int


@dataclass(frozen=True)
class LocalStage:
    """A stage as one rank sees it.

    Attributes:
        parts, cache: None where the rank computes nothing.
        carries: whether its summand of the output includes the residual.
        bundles: attention bundles of every worker, by rank.
    """

    stage: Stage
    parts: StageParts | None
    cache: KVCache | None
    carries: bool
    bundles: Mapping[int, int]


class RankProgram:
    """The weights and KV cache of one rank, and the loop over stages that uses them.

    Raises:
        CheckpointError: a tensor this rank needs is missing, misshapen or unreadable.
    """

    def __init__(
        self,
        rank: int,
        assignment: Assignment,
        config: ModelConfig,
        checkpoint: Checkpoint,
        cache_shape: CacheShape,
        dtype: torch.dtype,
        device: torch.device,
        on_stage_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank = rank
        self.assignment = assignment
        self._config = config
        self._dtype = dtype
        self._device = device
        self._rotary = RotaryTable(config, cache_shape.max_len, dtype, device)
        loader = PartLoader(config, checkpoint, dtype, device)
        self._stages: list[LocalStage] = []
        for stage in assignment.stages:
            parts = cache = None
            if stage.pieces[rank]:
                parts = loader.load(stage, rank)
                slots, max_len = cache_shape.slots, cache_shape.max_len
                cache = KVCache(slots, parts.kv_heads, max_len, config.head_dim, dtype, device)
            bundles = {worker: len(stage.attention_bundles(worker)) for worker in stage.workers}
            self._stages.append(LocalStage(stage, parts, cache, stage.carrier == rank, bundles))
            on_stage_loaded()
        self.head_rows = assignment.head_rows[rank]
        self._head = HeadShard.load(config, checkpoint, self.head_rows, dtype, device)

    @property
    def weight_bytes(self) -> int:
        parts = sum(local.parts.nbytes for local in self._stages if local.parts)
        return parts + self._head.nbytes

    @property
    def kv_bytes(self) -> int:
        return sum(local.cache.nbytes for local in self._stages if local.cache)

    def step(
        self, segments: Sequence[Segment], hidden_ND: Tensor | None, exchange: Exchange
    ) -> Tensor:
        """Compute one step of N tokens together with the other ranks of the exchange.

        Args:
            segments: the step's tokens, the same on every rank.
            hidden_ND: the embedded tokens; None on a rank that computes nothing of the first
                stage.

        Returns:
            Float32 logits [R, rows] on the rank's device: this rank's rows of the vocabulary,
            for each of the R segments that want logits.

        Raises:
            ExchangeError: a peer was lost, or does not follow the plan.
        """
        return self.head(self.layers(segments, hidden_ND, exchange))

    @torch.inference_mode()
    def layers(
        self, segments: Sequence[Segment], hidden_ND: Tensor | None, exchange: Exchange
    ) -> Tensor:
        """The step without the head: hidden states [R, D] of the tokens that want logits."""
        context = StepContext.of(segments, self._rotary, self._device)
        x_ND = None if hidden_ND is None else hidden_ND.to(self._device, self._dtype)
        for local in self._stages:
            x_ND = self._walk(local, x_ND, context, exchange)
        assert x_ND is not None, "the last stage's output reaches every rank"
        return x_ND[context.logit_rows]

    @torch.inference_mode()
    def head(self, hidden_RD: Tensor) -> Tensor:
        """Float32 logits [R, rows] of this rank's rows of the vocabulary."""
        return self._head(hidden_RD)

    def _walk(
        self, local: LocalStage, x_ND: Tensor | None, context: StepContext, exchange: Exchange
    ) -> Tensor | None:
        """The stage's output where this rank needs it next, else None."""
        partial_ND = None
        if local.parts is not None and local.cache is not None:
            assert x_ND is not None, "every worker of a stage gets its input"
            partial_ND = self._partial(local, local.parts, local.cache, x_ND, context, exchange)
        if local.stage.output_round is None:
            return partial_ND
        shape = (len(context.positions_N), self._config.hidden_size)
        shapes = dict.fromkeys(local.bundles, shape)
        parts = self._meet(local.stage.output_round, partial_ND, shapes, exchange)
        return sum_in_rank_order(parts) if parts else None

    def _partial(
        self,
        local: LocalStage,
        parts: StageParts,
        cache: KVCache,
        x_ND: Tensor,
        context: StepContext,
        exchange: Exchange,
    ) -> Tensor:
        """This rank's summand of y = x + sum over members of ( a + F(u) )."""
        eps = self._config.rms_norm_eps
        attended = parts.attention(rms_normalize(x_ND, eps), context, cache)
        visible = self._exchange_attention(local, attended, exchange)
        partial_ND = sum_tensors([x_ND, *attended] if local.carries else attended)
        for feed_forward, inputs in parts.feed_forwards:
            u_ND = sum_tensors([x_ND, *(visible[rank][bundle] for rank, bundle in inputs)])
            partial_ND = partial_ND + feed_forward(rms_normalize(u_ND, eps))
        return partial_ND

    def _exchange_attention(
        self, local: LocalStage, attended: list[Tensor], exchange: Exchange
    ) -> dict[int, Sequence[Tensor]]:
        """Attention outputs by rank and bundle, as far as feed-forward parts here take them."""
        if local.stage.attention_round is None:
            return {self.rank: attended}
        tokens, width = attended[0].shape
        shapes = {rank: (count, tokens, width) for rank, count in local.bundles.items()}
        own = torch.stack(attended)
        gathered = self._meet(local.stage.attention_round, own, shapes, exchange)
        return {rank: list(tensor.unbind()) for rank, tensor in gathered}

    def _meet(
        self,
        round: Round,
        own: Tensor | None,
        shapes: Mapping[int, tuple[int, ...]],
        exchange: Exchange,
    ) -> list[tuple[int, Tensor]]:
        """Take part in a round, if this rank has a part in it."""
        if own is None and not round.sources[self.rank]:
            return []
        return exchange.gather(round, own, shapes)


def sum_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Sum, in order; the first tensor itself where it is the only one."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
