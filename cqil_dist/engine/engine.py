"""The loop that turns requests into steps and logits into text.

Knows requests, the scheduler and something that computes steps; knows nothing of Ray, sockets or
plans. All of a request's work between two steps happens on the engine's own thread; other threads
submit, cancel and read streams.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cqil_dist.engine.detokenizer import Detokenizer
from cqil_dist.engine.prompts import PromptEncoder
from cqil_dist.engine.request import Request
from cqil_dist.engine.sampler import Sampler
from cqil_dist.engine.scheduler import ScheduledStep, Scheduler
from cqil_dist.errors import CqilError, ExchangeError, QueueFull
from cqil_dist.inputs import GenerationInput
from cqil_dist.model.step import Step, StepResult
from cqil_dist.status import EngineState, Recovery
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
    """What computes steps, one after another: a `RankGroup`, over however many ranks."""

    def begin(self, step: Step) -> None:
        """Start a step."""
        ...

    def finish(self) -> StepResult:
        """Wait for the step begun last.

        Raises:
            ExchangeError: the step has no result, and there will be no other.
        """
        ...

    def check(self) -> None:
        """Between steps: raises ExchangeError if there will be no other. Does not wait."""
        ...


Rebuild = Callable[[ExchangeError], tuple[StepModel, dict[str, float]]]
"""Another model with empty caches in place of one that failed, and the seconds its phases took.

Raises CqilError where there is none to be had.
"""


@dataclass
class _Loss:
    """A failure that no step has been computed since."""

    cause: str
    noticed: float
    attempts: int = 0
    phases: dict[str, float] = field(default_factory=dict)


class Engine:
    """Continuous batching of requests over one model.

    Args:
        max_len: most tokens a prompt and its completion may have together.
        slots: requests that run at the same time; more wait.
        prefill_tokens: most prompt tokens a step computes beside the decoding requests' tokens.
        max_waiting: most requests that wait for a slot; more are refused.
        rebuild: called where the model fails.
        on_recovery: told of each recovery.
    """

    def __init__(
        self,
        model: StepModel,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        *,
        max_len: int,
        slots: int,
        prefill_tokens: int,
        max_waiting: int,
        rebuild: Rebuild,
        on_recovery: Callable[[Recovery], None] = lambda recovery: None,
    ) -> None:
        self.max_len = max_len
        self.max_waiting = max_waiting
        self._rebuild = rebuild
        self._on_recovery = on_recovery
        self._model = model
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._prompts = PromptEncoder(tokenizer, vocab_size, max_len)
        self._steps = 0
        self._scheduler = Scheduler(slots, prefill_tokens)
        self._unreleased: list[Request] = []  # used by the engine's thread alone, as is:
        self._computing: tuple[Request, ...] = ()  # the requests of the step under way
        self._changed = threading.Condition()  # guards the scheduler and what follows
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
        request = Request(
            given,
            prompt_ids,
            Sampler(given.params, prompt_ids),
            Detokenizer(self._tokenizer, prompt_ids, given.params.stop),
            self._eos_token_ids,
            self.max_len,
            self._prompts.decode(given.prompt, prompt_ids) if given.echo else None,
        )
        request.replay(given.resume_token_ids)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if not request.finished:
                self._check_room(given)
                self._scheduler.add(request)
                self._changed.notify()
        return request

    def cancel(self, request: Request) -> None:
        """End a request early: its stream closes as "abort" and its slot is freed.

        At once where nothing computes it, be it that it waits or that a lost model is replaced.
        """
        with self._changed:
            if self._rebuilding or request.slot is None:
                self._drop(request)
            else:
                self._cancelled.append(request)
                self._changed.notify()

    def status(self) -> dict[str, Any]:
        """Counts of requests that run and wait, of slots, steps and recoveries; and the state."""
        with self._changed:
            state, detail = self._state()
            return {
                "state": state,
                "state_detail": detail,
                "recoveries": self._recoveries,
                "last_recovery": self._last_recovery,
                "running_requests": self._scheduler.running,
                "waiting_requests": self._scheduler.waiting,
                "free_slots": self._scheduler.free_slots,
                "slots": self._scheduler.slots,
                "max_waiting": self.max_waiting,
                "steps": self._steps,
            }

    def close(self) -> None:
        """Fail what is unfinished and stop the thread. Idempotent.

        A step under way ends with the model's links, which the caller closes.
        """
        self._fail(CqilError("the engine was closed before the request finished"))

    def _check_room(self, given: GenerationInput) -> None:
        # Those that the next step gives a slot do not wait.
        waiting = self._scheduler.waiting - self._scheduler.free_slots
        # One that resumes was let in before: there is room for as many more as can have been.
        before = self.max_waiting + self._scheduler.slots if given.resume_token_ids else 0
        if waiting >= self.max_waiting + before:
            raise QueueFull(
                f"all {self._scheduler.slots} slots are taken, and {self.max_waiting} requests "
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
        scheduled = self._next_step()
        self._computing = () if scheduled is None else scheduled.requests
        if scheduled is None:
            self._model.check()
            self._note_progress()
            return
        began = time.perf_counter()
        self._model.begin(scheduled.step)
        self._steps += 1
        self._release()  # while the ranks compute
        result = self._model.finish()
        self._note_progress()
        self._deliver(scheduled, result, began, time.perf_counter())

    def _next_step(self) -> ScheduledStep | None:
        """Wait a while for something to compute; None if there is nothing, or on closing."""
        with self._changed:
            if (step := self._schedule()) is None and self._failure is None:
                self._release()
                self._changed.wait(_IDLE_CHECK_S)
                step = self._schedule()
            return step

    def _schedule(self) -> ScheduledStep | None:
        self._drop_cancelled()
        return self._scheduler.schedule()

    def _recover(self, error: ExchangeError) -> None:
        """Go on with another model, on which every request computes its tokens again.

        Raises:
            CqilError: there is none.
        """
        self._release()  # what is known is told before the wait
        with self._changed:
            if self._failure is not None:  # closed: that is what ended the step
                return
            self._loss = loss = self._loss or _Loss(str(error), time.monotonic())
        loss.attempts += 1
        logger.warning("attempt %d to recover from: %s", loss.attempts, error)
        for request in self._computing:
            request.setbacks += 1
            if request.setbacks > _MAX_SETBACKS:
                with self._changed:
                    self._scheduler.remove(request)
                request.fail(error)
        self._computing = ()
        with self._changed:
            self._drop_cancelled()
            self._rebuilding = True
        try:
            self._model, phases = self._rebuild(error)
        finally:
            with self._changed:
                self._rebuilding = False
                self._scheduler.lose_cache()
        for name, seconds in phases.items():
            loss.phases[name] = loss.phases.get(name, 0.0) + seconds

    def _note_progress(self) -> None:
        """The model works: a loss before this is made good."""
        if (loss := self._loss) is None:
            return
        seconds = time.monotonic() - loss.noticed
        phases = {**loss.phases, "prefill": seconds - sum(loss.phases.values())}
        recovery = Recovery(loss.cause, seconds, phases)
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
        if not request.finished:
            self._scheduler.remove(request)
            request.abort()

    def _deliver(
        self, scheduled: ScheduledStep, result: StepResult, began: float, ended: float
    ) -> None:
        step = scheduled.step
        first = 0
        for segment, request in zip(step.segments, scheduled.requests, strict=True):
            request.computed = segment.end
            rows = result.rows[first : first + segment.logits]
            first += segment.logits
            timeline = None
            if request.wants_timeline:
                timeline = StepTimeline(
                    step=self._steps - 1,
                    step_tokens=len(step.token_ids),
                    request_tokens=segment.count,
                    start_ms=1000 * (began - request.arrived),
                    duration_ms=1000 * (ended - began),
                    ranks=result.ranks,
                )
            try:
                request.take(rows, step.argmax_only, timeline)
            except CqilError as error:
                request.fail(error)
            except Exception as error:  # one request's, whatever it is: the others go on
                request.fail(CqilError(f"choosing a token failed: {type(error).__name__}: {error}"))
            self._unreleased.append(request)
            if request.finished:
                with self._changed:
                    self._scheduler.remove(request)

    def _release(self) -> None:
        for request in self._unreleased:
            request.stream.release()
        self._unreleased.clear()

    def _fail(self, error: CqilError) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = error
            for request in self._scheduler.drain():
                request.fail(error)
            self._changed.notify()
