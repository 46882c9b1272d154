"""The ranks as the coordinator sees them: token ids in, logits out.

Also the ranks' end of the same conversation, so that the two halves of it stand on one page. Per
step the coordinator sends every rank one message (the segments and, to those that start, the
embedded tokens), and every rank answers with its share of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cqil_dist.assignment import Assignment
from cqil_dist.errors import ExchangeError
from cqil_dist.exchange.base import Exchange
from cqil_dist.exchange.link import Link, recv_each
from cqil_dist.model.head import Embedding
from cqil_dist.model.step import Segment
from cqil_dist.runtime.rank import RankProgram


class RankGroup:
    """All ranks of a launch, driven step by step over one link each.

    Args:
        links: to rank 0, 1, ... in order.
        step_deadline_s: seconds a step may take before a rank counts as lost.
    """

    def __init__(
        self,
        assignment: Assignment,
        embedding: Embedding,
        links: Sequence[Link],
        step_deadline_s: float,
    ) -> None:
        self._assignment = assignment
        self._embedding = embedding
        self._links = links
        self._step_deadline_s = step_deadline_s
        self.steps = 0

    def forward(self, segments: Sequence[Segment], token_ids: Sequence[int]) -> Tensor:
        """Compute one step.

        Args:
            token_ids: the tokens of all segments, in order.

        Returns:
            Float32 logits [R, V], a row for each segment that wants logits, in order.

        Raises:
            ExchangeError: a rank failed or was lost; the step has no result.
        """
        hidden_ND = self._embedding(token_ids)
        header = {
            "step": self.steps,
            "segments": [[s.slot, s.start, s.count, s.wants_logits] for s in segments],
        }
        self.steps += 1
        for rank, link in enumerate(self._links):
            starts = rank in self._assignment.entry_ranks
            link.send(header, hidden_ND if starts else None)
        shards: list[Tensor] = []
        errors: list[str] = []
        for rank, (answer, logits) in enumerate(recv_each(self._links, self._step_deadline_s)):
            if logits is None:
                errors.append(f"rank {rank}: {answer.get('error', answer)}")
            else:
                shards.append(logits)
        if errors:
            raise ExchangeError("; ".join(errors))
        return shards[0] if len(shards) == 1 else torch.cat(shards, dim=-1)

    def close(self) -> None:
        for link in self._links:
            link.close()


def serve_steps(program: RankProgram, link: Link, exchange: Exchange) -> None:
    """Answer the coordinator's steps until it closes the link.

    A step that fails is reported to the coordinator before the error is raised here: the peers
    cannot go on without this rank's part.

    Raises:
        PeerLost: the coordinator closed the link (the ordinary end), or a peer was lost.
        Exception: whatever the step failed with.
    """
    while True:
        header, hidden_ND = link.recv(timeout=None)
        exchange.begin_step(header["step"])
        segments = [Segment(*fields) for fields in header["segments"]]
        try:
            logits = program.step(segments, hidden_ND, exchange)
        except Exception as error:
            link.send({"error": f"{type(error).__name__}: {error}"})
            raise
        link.send({"step": header["step"]}, logits.cpu())
