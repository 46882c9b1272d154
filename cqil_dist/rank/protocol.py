"""The ranks as the coordinator sees them: token ids in, logits (or the likeliest tokens) out.

Also the ranks' end of the same conversation, so that the two halves of it stand on one page. Per
step the coordinator sends every rank one message (the segments and, to those that start, the
embedded tokens), and every rank answers for its share of the vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cqil_dist.assignment import Assignment
from cqil_dist.errors import ExchangeError, PeerLost
from cqil_dist.exchange.base import Exchange
from cqil_dist.exchange.link import Link, recv_each
from cqil_dist.model.head import Embedding
from cqil_dist.model.step import Segment, Step, StepResult
from cqil_dist.rank.clock import ClockOffset, timeline_of, times_of
from cqil_dist.rank.program import RankProgram


class RemoteRanks:
    """The ranks of a launch, all driven step by step over one link each.

    Args:
        assignments: who computes what, for each plan.
        embedding: the token embeddings.
        links: the connections to rank 0, 1, ... in order.
        step_deadline_s: seconds a step may take before a rank counts as lost.
    """

    def __init__(
        self,
        assignments: Sequence[Assignment],
        embedding: Embedding,
        links: Sequence[Link],
        step_deadline_s: float,
    ) -> None:
        self._entry_ranks = [frozenset(assignment.entry_ranks) for assignment in assignments]
        self._embedding = embedding
        self._links = links
        self._step_deadline_s = step_deadline_s
        self.steps = 0
        self._offsets = [ClockOffset() for _ in links]

    def begin(self, step: Step) -> None:
        """Send a step to every rank. See `StepModel.begin`.

        Raises:
            PeerLost: a rank is gone.
        """
        self._began = time.perf_counter()
        hidden_ND = self._embedding(step.token_ids)
        header = {
            "step": self.steps,
            "plan": step.plan_index,
            "segments": [[s.slot, s.start, s.count, s.wanted_logits] for s in step.segments],
            "argmax_only": step.argmax_only,
            "timeline": step.wants_timeline,
        }
        self.steps += 1
        for rank, link in enumerate(self._links):
            starts = rank in self._entry_ranks[step.plan_index]
            link.send(header, hidden_ND if starts else None)

    def finish(self) -> StepResult:
        """Gather every rank's answer to the step. See `StepModel.finish`."""
        answers = recv_each(self._links, self._step_deadline_s)
        ended = time.perf_counter()
        errors = [
            f"rank {rank}: {answer['error']}"
            for rank, (answer, _) in enumerate(answers)
            if "error" in answer
        ]
        if errors:
            raise ExchangeError("; ".join(errors))
        ranks = tuple(
            timeline_of(rank, answer["times"], offset, self._began, ended)
            for rank, ((answer, _), offset) in enumerate(zip(answers, self._offsets, strict=True))
            if "times" in answer
        )
        shards = [logits for _, logits in answers if logits is not None]
        if shards:
            return StepResult(torch.cat(shards, dim=-1), ranks)
        return StepResult(most_likely([answer["best"] for answer, _ in answers]), ranks)

    def check(self) -> None:
        """See `StepModel.check`. Raises PeerLost."""
        for link in self._links:
            link.check()

    def closed_ranks(self) -> set[int]:
        """Return the ranks that closed their link: the process ended, or its last step failed."""
        closed: set[int] = set()
        for rank, link in enumerate(self._links):
            try:
                link.check()
            except PeerLost:
                closed.add(rank)
        return closed

    def close(self) -> None:
        for link in self._links:  # whoever waits for all of them holds all of them
            link.shut_down()
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
        segments = [Segment(*fields) for fields in header["segments"]]
        exchange.begin_step(header["step"], sum(segment.count for segment in segments))
        try:
            logits = program.step(
                segments, hidden_ND, exchange, header["plan"], exact_times=header["timeline"]
            )
            answer: dict[str, Any] = {}
            if header["timeline"]:
                answer["times"] = times_of(program.clock)
            # A device's errors may show no earlier than here, where its results are waited for.
            if header["argmax_only"]:
                answer["best"] = best_of_shard(logits, program.head_rows)
                payload = None
            else:
                payload = logits.cpu()
        except Exception as error:
            link.send({"error": f"{type(error).__name__}: {error}"})
            raise
        link.send(answer, payload)


def best_of_shard(logits_RV: Tensor, rows: range) -> list[tuple[float, int]]:
    """Find the highest logit (NaN where not all are finite) and its token, by row of a shard.

    These few bytes replace the shard, which takes as long as a layer over an ordinary network.
    """
    values, indices = logits_RV.max(dim=-1)  # NaN is above every number
    values = values.where(logits_RV.amin(dim=-1).isfinite(), torch.nan)
    tokens = (indices + rows.start).tolist()
    return list(zip(values.tolist(), tokens, strict=True))


def most_likely(shards: Sequence[Sequence[tuple[float, int]]]) -> Tensor:
    """Return the token ids [R] of the highest logit over all shards; the lowest id wins a tie."""
    chosen: list[int] = []
    for candidates in zip(*shards, strict=True):
        finite = all(math.isfinite(value) for value, _ in candidates)
        highest = max(value for value, _ in candidates)
        best = min((token for value, token in candidates if value == highest), default=-1)
        chosen.append(best if finite else -1)
    return torch.tensor(chosen, dtype=torch.int64)
