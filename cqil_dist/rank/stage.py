"""One stage of a plan as one rank computes it: the page that every token passes, stage by stage.

Axes in names: N tokens of a step, D model width, B attention bundles (outputs that are seen by the
same feed-forward parts), M feed-forward inputs.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from cqil_dist.assignment import Stage
from cqil_dist.exchange.base import Exchange
from cqil_dist.model.parts import AttentionPart, FeedForwardPart
from cqil_dist.model.step import StepInput
from cqil_dist.rank.bypass import add_seen
from cqil_dist.rank.clock import StepClock
from cqil_dist.timeline import SpanKind


class RankStage:
    """The parts of one stage that one rank holds, and the exchanges with other ranks' parts.

    Calling it computes the rank's share of the group equations (CQIL, arXiv 2404.06709):

        a_j = A_j(x)                                for the group's members j
        u_j = x + sum of a_k over the members k that j sees
        y   = x + sum over j of ( a_j + F_j(u_j) )

    Args:
        index: the group's index in the plan.
        stage: who computes what of the group, and whose results each rank needs.
        rank: this rank.
        attention, feed_forward: the parts of this rank's pieces; None where it holds no heads, or
            no feed-forward columns, of the stage.
        clock: told when each part ended.
    """

    def __init__(
        self,
        index: int,
        stage: Stage,
        rank: int,
        attention: AttentionPart | None,
        feed_forward: FeedForwardPart | None,
        clock: StepClock,
    ) -> None:
        self._index = index
        self._attention = attention
        self._feed_forward = feed_forward
        self._attention_round = stage.attention_round
        self._output_round = stage.output_round
        self._owns_residual = stage.residual_owner == rank
        self._sees = stage.feed_forward_sees(rank)
        self._clock = clock

    def __call__(self, x_ND: Tensor | None, step: StepInput, exchange: Exchange) -> Tensor | None:
        """Compute the stage's output where this rank needs it next, else return None.

        Args:
            x_ND: the stage's input; None where the rank computes nothing of the stage.

        Raises:
            ExchangeError: a peer was lost, or does not follow the plan.
        """
        partial_ND = None
        if x_ND is not None:
            a_BND = self._attention(x_ND, step) if self._attention else None
            self._clock.mark(SpanKind.ATTENTION, self._index)
            gathered_BND = exchange.gather(self._attention_round, a_BND)
            if self._attention_round is not None:
                self._clock.mark(SpanKind.ATTENTION_EXCHANGE, self._index)
            terms = [x_ND] if self._owns_residual else []
            if a_BND is not None:
                terms += a_BND.unbind()
            if self._feed_forward:
                terms.append(self._feed_forward(add_seen(x_ND, gathered_BND, self._sees)))
            partial_ND = reduce(torch.add, terms)
            self._clock.mark(SpanKind.FEED_FORWARD, self._index)
        y_ND = exchange.sum(self._output_round, partial_ND)
        if self._output_round is not None:
            self._clock.mark(SpanKind.OUTPUT_EXCHANGE, self._index)
        return y_ND
