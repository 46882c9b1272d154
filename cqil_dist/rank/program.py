"""One rank's walk through a step: from the embedded tokens to its share of the logits.

Knows the assignment, the weights of its pieces and an exchange; knows nothing of Ray, sockets,
requests or sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cqil_dist.assignment import Assignment, Piece, Round, Stage
from cqil_dist.exchange.base import Exchange, sum_in_rank_order
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.head import HeadShard
from cqil_dist.model.kv_cache import KVCache
from cqil_dist.model.loading import PartLoader, StageParts
from cqil_dist.model.parts import rms_norm
from cqil_dist.model.rope import RotaryTable
from cqil_dist.model.step import Segment, StepContext
from cqil_dist.rank.clock import StepClock
from cqil_dist.timeline import SpanKind


@dataclass(frozen=True)
class CacheShape:
    """Room for `slots` sequences of up to `max_len` tokens each."""

    slots: int
    max_len: int


@dataclass(frozen=True)
class LocalStage:
    """A stage as one rank sees it.

    Attributes:
        group: its index in the plan.
        parts, cache: None where the rank computes nothing.
        carries: whether its summand of the output includes the residual.
        bundles: attention bundles of every worker, by rank.
    """

    group: int
    stage: Stage
    parts: StageParts | None
    cache: KVCache | None
    carries: bool
    bundles: Mapping[int, int]


class RankProgram:
    """The weights and KV cache of one rank, and the loop over stages that uses them.

    Args:
        assignments: one for each plan it can walk, over the same ranks. Where two have the rank
            compute the same pieces together, they share a cache, for a slot belongs to one
            sequence, and a sequence to one plan; and weights, where they have one checkpoint.
        checkpoints: one for each plan; they differ in nothing but adapters.

    Attributes:
        clock: where its time goes.

    Raises:
        CheckpointError: a tensor this rank needs is missing, misshapen or unreadable.
    """

    def __init__(
        self,
        rank: int,
        assignments: Sequence[Assignment],
        config: ModelConfig,
        checkpoints: Sequence[Checkpoint],
        cache_shape: CacheShape,
        dtype: torch.dtype,
        device: torch.device,
        on_stage_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank = rank
        self.clock = StepClock(device)
        self._config = config
        self._dtype = dtype
        self._device = device
        self._rotary = RotaryTable(config, cache_shape.max_len, dtype, device)
        self._cache_shape = cache_shape
        self._caches: dict[tuple[Piece, ...], KVCache] = {}
        self._loaders = {
            checkpoint: PartLoader(config, checkpoint, dtype, device) for checkpoint in checkpoints
        }
        self._plans: list[list[LocalStage]] = []
        for assignment, checkpoint in zip(assignments, checkpoints, strict=True):
            self._plans.append([])
            for group, stage in enumerate(assignment.stages):
                self._plans[-1].append(self._local(group, stage, self._loaders[checkpoint]))
                on_stage_loaded()
        self.head_rows = assignments[0].head_rows[rank]
        self._head = HeadShard.load(config, checkpoints[0], self.head_rows, dtype, device)

    @property
    def weight_bytes(self) -> int:
        return sum(loader.nbytes for loader in self._loaders.values()) + self._head.nbytes

    @property
    def kv_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches.values())

    def _local(self, group: int, stage: Stage, loader: PartLoader) -> LocalStage:
        parts = cache = None
        if pieces := stage.pieces[self.rank]:
            parts = loader.load(stage, self.rank)
            if (cache := self._caches.get(pieces)) is None:
                cache = self._caches[pieces] = self._cache(parts.kv_heads)
        bundles = {worker: len(stage.attention_bundles(worker)) for worker in stage.workers}
        return LocalStage(group, stage, parts, cache, stage.carrier == self.rank, bundles)

    def _cache(self, kv_heads: int) -> KVCache:
        slots, max_len = self._cache_shape.slots, self._cache_shape.max_len
        return KVCache(slots, kv_heads, max_len, self._config.head_dim, self._dtype, self._device)

    def step(
        self,
        segments: Sequence[Segment],
        hidden_ND: Tensor | None,
        exchange: Exchange,
        plan: int = 0,
        exact_times: bool = False,
    ) -> Tensor:
        """Compute one step of N tokens together with the other ranks of the exchange.

        Args:
            segments: the step's tokens, the same on every rank.
            hidden_ND: the embedded tokens; None on a rank that computes nothing of the first
                stage.
            plan: index of the plan to walk.
            exact_times: on a GPU, have the clock wait for every part.

        Returns:
            Float32 logits [R, rows] on the rank's device: this rank's rows of the vocabulary,
            for each of the R tokens after which logits are wanted.

        Raises:
            ExchangeError: a peer was lost, or does not follow the plan.
        """
        self.clock.begin(plan, exact_times)
        logits_RV = self.head(self.layers(segments, hidden_ND, exchange, plan))
        self.clock.mark(SpanKind.HEAD, len(self._plans[plan]))
        self.clock.end()
        return logits_RV

    @torch.inference_mode()
    def layers(
        self,
        segments: Sequence[Segment],
        hidden_ND: Tensor | None,
        exchange: Exchange,
        plan: int = 0,
    ) -> Tensor:
        """The step without the head: hidden states [R, D] of the tokens that want logits."""
        context = StepContext.of(segments, self._rotary, self._device)
        x_ND = None if hidden_ND is None else hidden_ND.to(self._device, self._dtype)
        for local in self._plans[plan]:
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
        total_ND = sum_in_rank_order(parts) if parts else None
        self.clock.mark(SpanKind.OUTPUT_EXCHANGE, local.group)
        return total_ND

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
        attended = parts.attention(rms_norm(x_ND, eps), context, cache)
        self.clock.mark(SpanKind.ATTENTION, local.group)
        visible = self._exchange_attention(local, attended, exchange)
        partial_ND = sum_tensors([x_ND, *attended] if local.carries else attended)
        for feed_forward, inputs in parts.feed_forwards:
            u_ND = sum_tensors([x_ND, *(visible[rank][bundle] for rank, bundle in inputs)])
            partial_ND = partial_ND + feed_forward(rms_norm(u_ND, eps))
        self.clock.mark(SpanKind.FEED_FORWARD, local.group)
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
        self.clock.mark(SpanKind.ATTENTION_EXCHANGE, local.group)
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
