"""An engine over a whole tiny model, whose steps are recorded, and the answers to its requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from helpers.tiny_models import VOCAB, LocalModel, TinyModel, random_tokens
from torch import Tensor

from cqil_dist.engine.config import EngineConfig
from cqil_dist.engine.engine import Engine, Rebuild, StepModel
from cqil_dist.engine.request import Request
from cqil_dist.errors import CqilError, ExchangeError, PeerLost
from cqil_dist.inputs import GenerationInput, Prompt
from cqil_dist.model.step import Step
from cqil_dist.outputs import Chunk, Completion
from cqil_dist.plan import Plan
from cqil_dist.sampling_params import SamplingParams

MAX_LEN = 64
PLAN = "P2 S1 E5 D1"
LOST = PeerLost(1, "10.0.0.2:4711", "it closed the connection")
PROMPTS = tuple(random_tokens(length, seed=length) for length in (3, 11, 1, 26))


class ObservedModel(LocalModel):
    """A model that records every step, and that can be paused between two steps."""

    def __init__(
        self, model: TinyModel, plan: Plan, slots: int, compare: Plan | None = None
    ) -> None:
        super().__init__(model, plan, slots, MAX_LEN, compare=compare)
        self.steps: list[Step] = []
        self.started = threading.Event()
        self._may_go_on = threading.Event()
        self._may_go_on.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no step end within the block.

        Requests are then submitted between the same two steps, however fast the engine is.
        """
        self._may_go_on.clear()
        try:
            yield
        finally:
            self._may_go_on.set()

    def compute(self, step: Step) -> Tensor:
        self.steps.append(step)
        self.started.set()
        assert self._may_go_on.wait(timeout=30)
        return super().compute(step)


class LostInStep(ObservedModel):
    """A model whose ranks are lost in the step of this number, when it is sent or answered."""

    def __init__(self, model: TinyModel, number: int, sent: bool = False) -> None:
        super().__init__(model, model.plan(PLAN), 4)
        self._number = number
        self._sent = sent

    def begin(self, step: Step) -> None:
        if self._sent and len(self.steps) == self._number:
            raise LOST
        super().begin(step)

    def compute(self, step: Step) -> Tensor:
        logits = super().compute(step)
        if len(self.steps) > self._number:
            raise LOST
        return logits


def give_up(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
    """A rebuild that fails, as there is no other model."""
    raise error


@contextmanager
def serving(
    model: TinyModel,
    steps: StepModel,
    rebuild: Rebuild = give_up,
    *,
    eos: Sequence[int] = (),
    slots: int = 4,
    max_len: int = MAX_LEN,
    prefill_tokens: int = 16,
    max_waiting: int = 16,
    **options: Any,
) -> Iterator[Engine]:
    engine = Engine(
        steps,
        model.tokenizer,
        eos,
        VOCAB,
        EngineConfig(
            slots=slots, max_len=max_len, prefill_tokens=prefill_tokens, max_waiting=max_waiting
        ),
        rebuild=rebuild,
        **options,
    )
    try:
        yield engine
    finally:
        engine.close()


def greedy(max_tokens: int = 12, **settings: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **settings)


def ask(prompt: Prompt, params: SamplingParams, **rest: Any) -> GenerationInput:
    """A request, as `Engine.submit` takes it."""
    return GenerationInput(prompt, params, **rest)


def read(request: Request, timeout_s: float = 30) -> list[Chunk]:
    """All chunks of a stream; raises the error that it ends with, or fails if it does not end."""
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
    """A request's completion, checked to be what its chunks add up to."""
    chunks = read(request)
    completion = chunks[-1].result
    assert completion is not None
    assert [chunk.result for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert "".join(chunk.text for chunk in chunks) == completion.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == completion.token_ids
    assert chunks[-1].finish_reason == completion.finish_reason
    return completion
