"""The loop that turns requests into steps and logits into text.

Knows requests, the scheduler and something that computes steps; knows nothing of Ray, sockets or
plans. All of a request's work between two steps happens on the engine's own thread; other threads
submit, cancel and read streams.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from cqil_dist.errors import CqilError, ExchangeError, RequestError
from cqil_dist.model.step import Segment
from cqil_dist.runtime.detokenizer import Detokenizer
from cqil_dist.runtime.request import Request
from cqil_dist.runtime.sampler import SampledToken, Sampler
from cqil_dist.runtime.scheduler import ScheduledStep, Scheduler
from cqil_dist.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StepModel(Protocol):
    """What computes steps, one after another: a `RankGroup`, over however many ranks."""

    def begin(
        self, segments: Sequence[Segment], token_ids: Sequence[int], argmax_only: bool
    ) -> None:
        """Start a step.

        Args:
            token_ids: the tokens of all segments, in order.
            argmax_only: the most likely tokens are wanted in place of the logits.
        """
        ...

    def finish(self) -> Tensor:
        """Wait for the step begun last.

        Returns:
            A row for each segment that wants logits, in order: float32 logits [R, V], or with
            `argmax_only` token ids, int64 [R], -1 where a logit is not a finite number.

        Raises:
            ExchangeError: the step has no result, and there will be no other.
        """
        ...


class Engine:
    """Continuous batching of requests over one model.

    Args:
        max_len: most tokens a prompt and its completion may have together.
        slots: requests that run at the same time; more wait.
        prefill_tokens: most prompt tokens a step computes beside the decoding requests' tokens.
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
    ) -> None:
        self.max_len = max_len
        self._model = model
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._steps = 0
        self._scheduler = Scheduler(slots, prefill_tokens)
        self._unreleased: list[Request] = []  # used by the engine's thread alone
        self._changed = threading.Condition()  # guards the scheduler and what follows
        self._cancelled: list[Request] = []
        self._failure: CqilError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams, final_only: bool = False
    ) -> Request:
        """Queue a request; its `stream` gives the chunks, or one at the end with `final_only`.

        Raises:
            RequestError: the prompt is empty, too long, or holds unknown token ids.
            CqilError: the engine is closed, or lost its model.
        """
        prompt_ids = self._encode(prompt)
        request = Request(
            prompt_ids,
            params,
            Sampler(params, prompt_ids),
            Detokenizer(self._tokenizer, prompt_ids, params.stop),
            self._eos_token_ids,
            final_only,
        )
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._scheduler.add(request)
            self._changed.notify()
        return request

    def submit_chat(
        self, messages: list[dict[str, str]], params: SamplingParams, final_only: bool = False
    ) -> Request:
        """Queue a conversation, laid out by the model's chat template.

        Raises:
            RequestError: no messages, or the model has no chat template that takes them.
        """
        if not messages:
            raise RequestError("the chat has no messages")
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # templates are programs: they raise what they like
            raise RequestError(
                f"the model's chat template refused the messages: {error}"
            ) from error
        return self.submit(list(encoded["input_ids"]), params, final_only)

    def cancel(self, request: Request) -> None:
        """End a request early: its stream closes as "abort" and its slot is freed."""
        with self._changed:
            self._cancelled.append(request)
            self._changed.notify()

    def status(self) -> dict[str, Any]:
        """Counts of requests that run and wait, of slots, and of steps so far."""
        with self._changed:
            return {
                "running_requests": self._scheduler.running,
                "waiting_requests": self._scheduler.waiting,
                "free_slots": self._scheduler.free_slots,
                "slots": self._scheduler.slots,
                "steps": self._steps,
            }

    def close(self) -> None:
        """Fail what is unfinished and stop the thread. Idempotent.

        A step under way ends with the model's links, which the caller closes.
        """
        self._fail(CqilError("the engine was closed before the request finished"))

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            prompt_ids: list[int] = self._tokenizer(prompt)["input_ids"]
        else:
            prompt_ids = list(prompt)
        if not prompt_ids:
            raise RequestError("the prompt is empty; give at least one token to continue")
        if unknown := [id for id in prompt_ids if id not in range(self._vocab_size)]:
            raise RequestError(
                f"prompt token ids {unknown[:5]} lie outside the vocabulary (0 to "
                f"{self._vocab_size - 1})"
            )
        if len(prompt_ids) >= self.max_len:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, but prompt and completion together may "
                f"have {self.max_len}; shorten the prompt, or launch with a larger max_len"
            )
        return prompt_ids

    def _run(self) -> None:
        try:
            while (step := self._next_step()) is not None:
                argmax_only = all(request.wants_argmax for request in step.requests)
                self._model.begin(step.segments, step.token_ids, argmax_only)
                self._steps += 1
                self._release()  # while the ranks compute
                self._deliver(step, self._model.finish(), argmax_only)
        except ExchangeError as error:
            self._fail(error)
        except BaseException as error:
            # Nobody else would tell those who wait for this thread.
            self._fail(CqilError(f"the engine stopped: {type(error).__name__}: {error}"))
            raise
        finally:
            self._release()

    def _next_step(self) -> ScheduledStep | None:
        """Wait for something to compute; None when the engine is closed."""
        with self._changed:
            while self._failure is None:
                for request in self._cancelled:
                    self._drop(request)
                self._cancelled.clear()
                if (step := self._scheduler.schedule()) is not None:
                    return step
                self._release()
                self._changed.wait()
            return None

    def _drop(self, request: Request) -> None:
        if not request.finished:
            self._scheduler.remove(request)
            request.abort()

    def _deliver(self, step: ScheduledStep, rows: Tensor, argmax_only: bool) -> None:
        row = iter(rows)
        for segment, request in zip(step.segments, step.requests, strict=True):
            request.computed = segment.end
            if not segment.wants_logits:
                continue
            result = next(row)
            try:
                sampled = _argmax_of(result) if argmax_only else request.choose(result)
                request.advance(sampled, self.max_len)
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


def _argmax_of(token_id: Tensor) -> SampledToken:
    if (chosen := int(token_id)) < 0:
        raise CqilError(
            "some logits are NaN or infinite, so no token can be chosen: the model overflowed in "
            "its dtype or its weights are damaged; try dtype float32"
        )
    return SampledToken(chosen)
