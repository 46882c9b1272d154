"""The loop that turns requests into steps and logits into text.

Knows requests, the scheduler and something that computes steps; knows nothing of Ray, sockets or
plans. All of a request's work between two steps happens on the engine's own thread; other threads
submit, cancel and read streams.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cqil_dist.engine.config import EngineConfig
from cqil_dist.engine.prompts import PromptEncoder
from cqil_dist.engine.request import Request
from cqil_dist.engine.scheduler import Scheduler
from cqil_dist.engine.sequence import Sequence
from cqil_dist.engine.slot_pool import SlotPool
from cqil_dist.errors import CqilError, ExchangeError, QueueFull
from cqil_dist.inputs import GenerationInput
from cqil_dist.model.step import Segment, Step, StepResult
from cqil_dist.status import EngineState, EngineStatus, Recovery
from cqil_dist.timeline import StepTimeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# How often an idle engine looks whether its ranks are still there.
_IDLE_CHECK_S = 0.5
# Losses in a row that may strike the steps of one request before it gains a token. More are not
# bad luck: something in the request breaks whatever computes it.
_MAX_SETBACKS = 5


class StepModel(Protocol):
    """A model that computes steps one after another; in serving, `rank.protocol.RemoteRanks`."""

    def begin(self, step: Step) -> None:
        """Start computing a step."""
        ...

    def finish(self) -> StepResult:
        """Wait for the step begun last, and return its result.

        Raises:
            ExchangeError: the step has no result, and there will be no other.
        """
        ...

    def check(self) -> None:
        """Raise ExchangeError if no further step can be computed; asked between steps, at once."""
        ...


Rebuild = Callable[[ExchangeError], tuple[StepModel, dict[str, float]]]
"""Replaces a model that failed: gives one with empty caches, and the seconds each phase took.

Raises CqilError where no other model can be had.
"""


@dataclass
class _Loss:
    """A failure of the model that has not been made good yet: no step has been computed since.

    Attributes:
        cause: what failed, and how that was noticed.
        noticed: when, seconds of `time.monotonic`.
        attempts: how many other models were asked for.
        phases: seconds that each phase of getting them took.
    """

    cause: str
    noticed: float
    attempts: int = 0
    phases: dict[str, float] = field(default_factory=dict)

    def add_phases(self, phases: dict[str, float]) -> None:
        """Add the seconds that the phases of one attempt took."""
        for name, seconds in phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + seconds

    def made_good(self) -> Recovery:
        """Sum up the recovery, once the new model has computed a step or is ready for one."""
        seconds = time.monotonic() - self.noticed
        phases = {**self.phases, "prefill": seconds - sum(self.phases.values())}
        return Recovery(self.cause, seconds, phases)


@dataclass(frozen=True)
class _ComputedStep:
    """A step that has been computed, from `began` to `ended` (seconds of `time.perf_counter`)."""

    number: int
    step: Step
    result: StepResult
    began: float
    ended: float

    def timeline(self, segment: Segment, arrived: float) -> StepTimeline:
        """Describe the step to the request of one of its segments, which came at `arrived`."""
        return StepTimeline(
            step=self.number,
            step_tokens=len(self.step.token_ids),
            request_tokens=segment.count,
            start_ms=1000 * (self.began - arrived),
            duration_ms=1000 * (self.ended - self.began),
            ranks=self.result.ranks,
        )


class Engine:
    """Continuous batching of requests over one model.

    Args:
        config: the numbers that bound it.
        rebuild: called where the model fails.
        on_recovery: told of each recovery.
    """

    def __init__(
        self,
        model: StepModel,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Collection[int],
        vocab_size: int,
        config: EngineConfig,
        *,
        rebuild: Rebuild,
        on_recovery: Callable[[Recovery], None] = lambda recovery: None,
    ) -> None:
        self.max_len = config.max_len
        self.max_waiting = config.max_waiting
        self._rebuild = rebuild
        self._on_recovery = on_recovery
        self._model = model
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._prompts = PromptEncoder(tokenizer, vocab_size, config.max_len)
        self._steps = 0
        self._slots = SlotPool(config.slots)
        self._scheduler = Scheduler(self._slots, config.prefill_tokens)
        # Used by the engine's thread alone: answers to be released, requests of the step under way.
        self._unreleased: list[Request] = []
        self._computing: list[Request] = []
        self._changed = threading.Condition()  # guards the scheduler, its slots and what follows
        self._requests: dict[Sequence, Request] = {}  # all that the scheduler has
        self._cancelled: list[Request] = []
        self._failure: CqilError | None = None
        self._loss: _Loss | None = None
        self._rebuilding = False  # the engine's thread waits for another model
        self._recoveries = 0
        self._last_recovery: Recovery | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, given: GenerationInput) -> Request:
        """Queue a request; its `stream` gives the chunks.

        Raises:
            RequestError: the prompt is empty, too long, holds unknown token ids, or is a
                conversation that the model's chat template does not take.
            QueueFull: as many requests wait as may. One that resumes was let in before.
            CqilError: the engine is closed, or lost its model.
        """
        prompt_ids = self._prompts.encode(given.prompt, given.params.max_tokens)
        self._prompts.check_known(given.resume_token_ids)
        echo = self._prompts.decode(given.prompt, prompt_ids) if given.echo else None
        request = Request(
            given, prompt_ids, echo, self._tokenizer, self._eos_token_ids, self.max_len
        )
        request.replay(given.resume_token_ids)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if not request.answer.finished:
                self._check_room(given)
                self._requests[request.sequence] = request
                self._scheduler.add(request.sequence)
                self._changed.notify()
        return request

    def cancel(self, request: Request) -> None:
        """End a request early: its stream closes as "abort" and its slot is freed.

        That happens at once where no step computes it: while it waits for a slot, or while a lost
        model is being replaced.
        """
        with self._changed:
            if self._rebuilding or request.sequence.slot is None:
                self._drop(request)
            else:
                self._cancelled.append(request)
                self._changed.notify()

    def status(self) -> EngineStatus:
        """Describe how the engine is doing, and how busy it is."""
        with self._changed:
            state, detail = self._state()
            return EngineStatus(
                state=state,
                state_detail=detail,
                recoveries=self._recoveries,
                last_recovery=self._last_recovery,
                running_requests=self._scheduler.running,
                waiting_requests=self._scheduler.waiting,
                free_slots=self._slots.free,
                slots=self._slots.size,
                max_waiting=self.max_waiting,
                steps=self._steps,
            )

    def close(self) -> None:
        """Fail what is unfinished and stop the thread. Idempotent.

        A step under way ends with the model's links, which the caller closes.
        """
        self._fail(CqilError("the engine was closed before the request finished"))

    def _check_room(self, given: GenerationInput) -> None:
        """Raise QueueFull if no further request may wait."""
        # Those that the next step gives a slot do not wait.
        waiting = self._scheduler.waiting - self._slots.free
        # One that resumes was let in before: there is room for as many more as can have been.
        before = self.max_waiting + self._slots.size if given.resume_token_ids else 0
        if waiting >= self.max_waiting + before:
            raise QueueFull(
                f"all {self._slots.size} slots are taken, and {self.max_waiting} requests "
                "wait, which is as many as may; try again later"
            )

    def _state(self) -> tuple[EngineState, str]:
        if self._failure is not None:
            return "failed", str(self._failure)
        if self._loss is not None:
            return "recovering", self._loss.cause
        return "serving", ""

    def _run(self) -> None:
        try:
            while self._failure is None:
                try:
                    self._work()
                except ExchangeError as error:
                    self._recover(error)
        except CqilError as error:
            self._fail(error)
        except BaseException as error:
            # Nobody else would tell those who wait for this thread.
            self._fail(CqilError(f"the engine stopped: {type(error).__name__}: {error}"))
            raise
        finally:
            self._release()

    def _work(self) -> None:
        """Compute a step, or find nothing to compute for a while."""
        computed: _ComputedStep | None = None
        if (step := self._next_step()) is None:
            self._model.check()
        else:
            number, began = self._steps, time.perf_counter()
            self._model.begin(step)
            self._steps += 1
            self._release()  # while the ranks compute
            result = self._model.finish()
            computed = _ComputedStep(number, step, result, began, time.perf_counter())
        if self._loss is not None:  # the model works: what was lost before is made good
            self._note_recovery(self._loss.made_good())
        if computed is not None:
            self._deliver(computed)

    def _next_step(self) -> Step | None:
        """Choose the next step, after a short wait for one where there is none; or else None."""
        with self._changed:
            if self._cancelled:
                self._drop_cancelled()
            if not self._requests and self._failure is None:
                self._release()
                self._changed.wait(_IDLE_CHECK_S)
            scheduled = self._scheduler.schedule()
            if scheduled is None:
                self._computing = []
                return None
            self._computing = [self._requests[sequence] for sequence in scheduled.sequences]
            return scheduled.step

    def _deliver(self, computed: _ComputedStep) -> None:
        """Hand its share of a step's result to every request of the step."""
        step, rows = computed.step, computed.result.rows
        logits_of_each = rows.split_with_sizes([segment.wanted_logits for segment in step.segments])
        for segment, request, logits in zip(
            step.segments, self._computing, logits_of_each, strict=True
        ):
            sequence, answer = request.sequence, request.answer
            sequence.computed += segment.count
            timeline = None
            if sequence.wants_timeline:
                timeline = computed.timeline(segment, answer.arrived)
            try:
                request.take(logits, step.argmax_only, timeline)
            except CqilError as error:
                answer.fail(error)
            except Exception as error:  # one request's, whatever it is: the others go on
                answer.fail(CqilError(f"choosing a token failed: {type(error).__name__}: {error}"))
            self._unreleased.append(request)
            if answer.finished:
                with self._changed:
                    self._forget(request)

    def _release(self) -> None:
        """Let the callers see what their streams hold since the last time."""
        for request in self._unreleased:
            request.stream.release()
        self._unreleased.clear()

    def _recover(self, error: ExchangeError) -> None:
        """Replace a model that failed; the new one computes every request's tokens again.

        Raises:
            CqilError: there is none.
        """
        self._release()  # what is known is told before the wait
        with self._changed:
            if self._failure is not None:  # closed: that is what ended the step
                return
            self._loss = loss = self._loss or _Loss(str(error), time.monotonic())
            self._count_setbacks(error)
            self._drop_cancelled()
            self._rebuilding = True  # those cancelled from now on are dropped at once
        loss.attempts += 1
        logger.warning("attempt %d to recover from: %s", loss.attempts, error)
        try:
            self._model, phases = self._rebuild(error)
        finally:
            with self._changed:
                self._rebuilding = False
                self._slots.lose_cache()
        loss.add_phases(phases)

    def _count_setbacks(self, error: ExchangeError) -> None:
        """Count a loss for the requests in whose step it fell, and fail those with too many."""
        for request in self._computing:
            request.sequence.setbacks += 1
            if request.sequence.setbacks > _MAX_SETBACKS:
                self._forget(request)
                request.answer.fail(error)
        self._computing = []

    def _note_recovery(self, recovery: Recovery) -> None:
        with self._changed:
            self._loss = None
            self._recoveries += 1
            self._last_recovery = recovery
        logger.warning("%s", recovery)
        self._on_recovery(recovery)

    def _drop_cancelled(self) -> None:
        for request in self._cancelled:
            self._drop(request)
        self._cancelled.clear()

    def _drop(self, request: Request) -> None:
        if not request.answer.finished:
            self._forget(request)
            request.answer.abort()

    def _forget(self, request: Request) -> None:
        """Take a request out of the scheduler, if it is still there."""
        self._scheduler.remove(request.sequence)
        self._requests.pop(request.sequence, None)

    def _fail(self, error: CqilError) -> None:
        """Refuse requests from now on, and fail all that are there."""
        with self._changed:
            if self._failure is None:
                self._failure = error
            for sequence in self._scheduler.drain():
                self._requests.pop(sequence).answer.fail(error)
            self._changed.notify()
