"""An engine over a whole tiny model, and what its requests give."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tiny_models import LocalModel, TinyModel, random_tokens
from torch import Tensor

from cqil_dist.errors import CqilError
from cqil_dist.model.step import Segment
from cqil_dist.outputs import Chunk, Completion
from cqil_dist.plan import Plan
from cqil_dist.runtime.request import Request
from cqil_dist.sampling_params import SamplingParams

MAX_LEN = 64
PROMPTS = tuple(random_tokens(length, seed=length) for length in (3, 11, 1, 26))


class ObservedModel(LocalModel):
    """Keeps the segments of every step, and can be held up between two steps."""

    def __init__(self, model: TinyModel, plan: Plan, slots: int) -> None:
        super().__init__(model, plan, slots, MAX_LEN)
        self.steps: list[tuple[Segment, ...]] = []
        self.started = threading.Event()
        self._may_go_on = threading.Event()
        self._may_go_on.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """No step ends in this block, so that requests are submitted between the same steps
        however fast the engine is."""
        self._may_go_on.clear()
        try:
            yield
        finally:
            self._may_go_on.set()

    def forward(self, segments: Sequence[Segment], token_ids: Sequence[int]) -> Tensor:
        self.steps.append(tuple(segments))
        self.started.set()
        assert self._may_go_on.wait(timeout=30)
        return super().forward(segments, token_ids)


def greedy(max_tokens: int = 12, **settings: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **settings)


def read(request: Request, timeout_s: float = 30) -> list[Chunk]:
    """All chunks of a stream. Raises the error it ends with; fails where it does not end."""
    chunks: list[Chunk] = []
    errors: list[CqilError] = []

    def iterate() -> None:
        try:
            chunks.extend(request.stream)
        except CqilError as error:
            errors.append(error)

    reader = threading.Thread(target=iterate, daemon=True)
    reader.start()
    reader.join(timeout_s)
    assert not reader.is_alive(), "the stream does not end"
    if errors:
        raise errors[0]
    return chunks


def finish(request: Request) -> Completion:
    """The completion, which is what the chunks were."""
    chunks = read(request)
    completion = chunks[-1].result
    assert completion is not None
    assert [chunk.result for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert "".join(chunk.text for chunk in chunks) == completion.text
    assert tuple(id for chunk in chunks for id in chunk.token_ids) == completion.token_ids
    assert chunks[-1].finish_reason == completion.finish_reason
    return completion
