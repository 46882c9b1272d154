"""One rank's walk through a step: from the embedded tokens to its share of the logits.

Knows the assignment, the weights of its pieces and an exchange; knows nothing of Ray, sockets,
requests or sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cqil_dist.assignment import Assignment, Stage
from cqil_dist.costs import Piece
from cqil_dist.exchange.base import Exchange
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.kv_cache import KVCache
from cqil_dist.model.parts import PartBackend
from cqil_dist.model.precision import Precision
from cqil_dist.model.rope import RotaryTable
from cqil_dist.model.step import Segment, StepInput
from cqil_dist.model.torch_backend import TorchBackend
from cqil_dist.rank.clock import StepClock
from cqil_dist.rank.stage import RankStage
from cqil_dist.timeline import SpanKind


@dataclass(frozen=True)
class CacheShape:
    """The room for `slots` sequences of up to `max_len` tokens each."""

    slots: int
    max_len: int


class RankProgram:
    """The weights and KV cache of one rank, and the loop over stages that uses them.

    Args:
        assignments: one for each plan it can walk, over the same ranks. Where two have the rank
            compute the same pieces together, they share a cache, for a slot belongs to one
            sequence, and a sequence to one plan; and weights, where they have one checkpoint.
        checkpoints: one for each plan; they differ in nothing but adapters.

    Attributes:
        clock: where the rank's time goes.
        head_rows, head: the rank's rows of the vocabulary, and the part that computes them.

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
        precision: Precision,
        device: torch.device,
        on_stage_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank = rank
        self.clock = StepClock(device)
        self._config = config
        self._precision = precision
        self._dtype = precision.compute_dtype
        self._device = device
        self._rotary = RotaryTable(config, cache_shape.max_len, self._dtype, device)
        self._windows = frozenset(config.windows)
        self._cache_shape = cache_shape
        self._caches: dict[tuple[Piece, ...], KVCache] = {}
        self._filled = [0] * cache_shape.slots
        self._backends: dict[Checkpoint, PartBackend] = {
            checkpoint: TorchBackend(config, checkpoint, precision, device)
            for checkpoint in checkpoints
        }
        self._plans: list[list[RankStage]] = []
        for assignment, checkpoint in zip(assignments, checkpoints, strict=True):
            self._plans.append([])
            for index, stage in enumerate(assignment.stages):
                self._plans[-1].append(self._load(index, stage, self._backends[checkpoint]))
                on_stage_loaded()
        self.head_rows = assignments[0].head_rows[rank]
        self.head = self._backends[checkpoints[0]].head(self.head_rows)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the weights of all plans."""
        return sum(backend.nbytes for backend in self._backends.values())

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of the caches of all plans."""
        return sum(cache.nbytes for cache in self._caches.values())

    def _load(self, index: int, stage: Stage, backend: PartBackend) -> RankStage:
        attention = feed_forward = None
        if bundles := stage.attention_bundles(self.rank):
            attention = backend.attention(bundles, self._cache(stage.pieces[self.rank]))
        if bundles := stage.feed_forward_bundles(self.rank):
            feed_forward = backend.feed_forward(bundles)
        return RankStage(index, stage, self.rank, attention, feed_forward, self.clock)

    def _cache(self, pieces: tuple[Piece, ...]) -> KVCache:
        if pieces not in self._caches:
            shape = self._config.shape
            self._caches[pieces] = KVCache(
                self._cache_shape.slots,
                sum(len(shape.kv_heads(piece.heads)) for piece in pieces),
                self._cache_shape.max_len,
                self._config.head_dim,
                self._precision.kv_dtype,
                self._device,
            )
        return self._caches[pieces]

    @torch.inference_mode()
    def step(
        self,
        segments: Sequence[Segment],
        hidden_ND: Tensor | None,
        exchange: Exchange,
        plan_index: int = 0,
        *,
        exact_times: bool = False,
    ) -> Tensor:
        """Compute one step of N tokens together with the other ranks of the exchange.

        Args:
            segments: the step's tokens, the same on every rank.
            hidden_ND: the embedded tokens; None on a rank that computes nothing of the first
                stage.
            plan_index: which of the plans to walk.
            exact_times: on a GPU, have the clock wait for every part.

        Returns:
            Float32 logits [R, rows] on the rank's device: this rank's rows of the vocabulary,
            for each of the R tokens after which logits are wanted.

        Raises:
            ExchangeError: a peer was lost, or does not follow the plan.
        """
        self.clock.begin(plan_index, exact_times)
        logits_RV = self.head(self.layers(segments, hidden_ND, exchange, plan_index))
        self.clock.mark(SpanKind.HEAD, len(self._plans[plan_index]))
        self.clock.end()
        return logits_RV

    @torch.inference_mode()
    def layers(
        self,
        segments: Sequence[Segment],
        hidden_ND: Tensor | None,
        exchange: Exchange,
        plan_index: int = 0,
    ) -> Tensor:
        """Compute a step but for the head: hidden states [R, D] of the tokens that want logits."""
        for segment in segments:
            if segment.start == 0:  # of another sequence than before: forget what that one wrote
                for cache in self._caches.values():
                    cache.clear(segment.slot, self._filled[segment.slot])
            self._filled[segment.slot] = segment.start + segment.count
        step = StepInput.of(segments, self._rotary, self._windows, self._device)
        x_ND = None
        if hidden_ND is not None:
            x_ND = hidden_ND.to(self._device, self._dtype)
        for stage in self._plans[plan_index]:
            x_ND = stage(x_ND, step, exchange)
        assert x_ND is not None, "the last stage's output reaches every rank"
        return x_ND[step.logit_rows_R]
