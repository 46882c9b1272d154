"""All ranks of a model in this process, connected by real sockets.

Each rank runs in a thread of its own, with its own weights, cache and TCP connections. It gets what
the coordinator would send it: only the ranks of the first stage get the embedded tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch
from helpers.exchange_mesh import tcp_mesh
from helpers.tiny_models import CPU, TinyModel
from torch import Tensor

from cqil_dist.assignment import Assignment
from cqil_dist.exchange import TcpExchange
from cqil_dist.model.head import Embedding
from cqil_dist.model.precision import Precision
from cqil_dist.model.step import Segment
from cqil_dist.rank.program import CacheShape, RankProgram

DEADLINE_S = 10.0
SLOTS, MAX_LEN = 5, 48


class Ranks:
    """The connected ranks of one assignment or several, each in its thread."""

    def __init__(
        self,
        model: TinyModel,
        assignments: Sequence[Assignment],
        exchanges: Sequence[TcpExchange],
        pool: ThreadPoolExecutor,
        dtype: torch.dtype,
    ) -> None:
        self.exchanges = exchanges
        self._assignments = assignments
        self._embedding = Embedding(model.config, model.checkpoint, dtype)
        self._pool = pool
        self._steps = 0
        shape = CacheShape(SLOTS, MAX_LEN)
        self.programs = [
            RankProgram(
                rank,
                assignments,
                model.config,
                [model.checkpoint] * len(assignments),
                shape,
                Precision.of(str(dtype).removeprefix("torch.")),
                CPU,
            )
            for rank in range(assignments[0].world)
        ]

    def hidden(
        self, segments: Sequence[Segment], token_ids: Sequence[int], plan: int = 0
    ) -> list[Tensor]:
        """The step's last hidden states [R, D], as each rank holds them."""
        embedded = self._embedding(token_ids)
        self._steps += 1

        def walk(rank: int) -> Tensor:
            self.exchanges[rank].begin_step(self._steps, len(token_ids))
            starts = rank in self._assignments[plan].entry_ranks
            hidden = embedded.clone() if starts else None
            return self.programs[rank].layers(segments, hidden, self.exchanges[rank], plan)

        futures: list[Future[Tensor]] = [
            self._pool.submit(walk, rank) for rank in range(len(self.programs))
        ]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if errors := [future.exception() for future in done if future.exception()]:
            for exchange in self.exchanges:
                exchange.close()  # so that the others do not wait for their deadline
            raise AssertionError("a rank failed") from errors[0]
        return [future.result() for future in futures]

    def forward(
        self, segments: Sequence[Segment], token_ids: Sequence[int], plan: int = 0
    ) -> Tensor:
        """The step's logits [R, V], joined from all ranks' shards."""
        hidden = self.hidden(segments, token_ids, plan)
        with torch.inference_mode():
            shards = [p.head(h) for p, h in zip(self.programs, hidden, strict=True)]
        return torch.cat(shards, dim=-1)

    def logits(self, token_ids: Sequence[int], cuts: Sequence[int], slot: int = 0) -> Tensor:
        """Logits [R, V] after the last token of each chunk, which have `cuts` tokens."""
        rows: list[Tensor] = []
        start = 0
        for count in cuts:
            chunk = token_ids[start : start + count]
            rows.append(self.forward([Segment(slot, start, count, 1)], chunk))
            start += count
        return torch.cat(rows)


@contextmanager
def connected(
    model: TinyModel, *assignments: Assignment, dtype: torch.dtype = torch.float32
) -> Iterator[Ranks]:
    """Connect the ranks of one assignment, or of several over the same ranks, on loopback."""
    world = assignments[0].world
    mesh = tcp_mesh(
        world, width=model.config.hidden_size, dtype=dtype, deadline_s=DEADLINE_S, spin_s=0.0
    )
    with mesh as exchanges, ThreadPoolExecutor(world) as pool:
        yield Ranks(model, assignments, exchanges, pool, dtype)
