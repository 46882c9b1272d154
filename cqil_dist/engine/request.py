"""One request's life on the coordinator: its tokens so far, and the chunks it gives back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from cqil_dist.engine.chunk_stream import ChunkStream
from cqil_dist.engine.detokenizer import Detokenizer
from cqil_dist.engine.sampler import SampledToken, Sampler, check_finite, chosen, scored
from cqil_dist.errors import CqilError
from cqil_dist.inputs import GenerationInput
from cqil_dist.outputs import Chunk, Completion, FinishReason, Timings, TokenLogprob, Usage
from cqil_dist.timeline import StepTimeline


@dataclass(frozen=True)
class _Ending:
    """Why a request ends, and the text that its end makes final."""

    text: str
    reason: FinishReason
    stop_reason: str | int | None = None


class Request:
    """A prompt being continued.

    The tokens are all of its state: with `computed` set to 0 its KV cache can be filled again on
    any ranks, and it goes on where it was.

    Attributes:
        tokens: prompt and output so far.
        computed: how many of them are in the KV cache.
        plan: index of the plan it runs under.
        slot: KV slot, or None while waiting for one.
        finished: the stream has ended.
        setbacks: losses of the model during its steps, since it last gained a token.
    """

    def __init__(
        self,
        given: GenerationInput,
        prompt_ids: Sequence[int],
        sampler: Sampler,
        detokenizer: Detokenizer,
        eos_token_ids: Sequence[int],
        max_len: int,
        prompt_text: str | None = None,
    ) -> None:
        params = given.params
        self.tokens = list(prompt_ids)
        self.params = params
        self.plan = given.plan
        self.wants_timeline = given.timeline and not given.final_only
        self.computed = 0
        self.slot: int | None = None
        self.finished = False
        self.setbacks = 0
        self.stream = ChunkStream()
        self._final_only = given.final_only
        self._max_len = max_len
        self._prompt_text = prompt_text
        self._prompt_length = len(prompt_ids)
        self._sampler = sampler
        self._detokenizer = detokenizer
        self._eos_token_ids = () if params.ignore_eos else tuple(eos_token_ids)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] | None = None
        if params.prompt_logprobs is not None:
            first = prompt_ids[0]
            self._prompt_logprobs = [TokenLogprob(first, detokenizer.token_text(first), None)]
        # How it ends as soon as its prompt has been computed.
        self._ending = _Ending("", "length") if params.max_tokens == 0 else None
        self._token_times = [time.perf_counter()]  # arrival, then one entry per token

    @property
    def arrived(self) -> float:
        """When it was submitted, seconds of `time.perf_counter`."""
        return self._token_times[0]

    @property
    def pending(self) -> int:
        """Tokens that are not in the KV cache yet."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> tuple[int, ...]:
        return tuple(self.tokens[self._prompt_length :])

    @property
    def wanted_from(self) -> int:
        """Position of the first token after which logits are wanted."""
        if self._prompt_logprobs is not None and not self._prompt_is_scored:
            return len(self._prompt_logprobs) - 1
        return len(self.tokens) - 1

    @property
    def wants_argmax(self) -> bool:
        """Whether the most likely token is all it wants to know of the logits."""
        params = self.params
        return (
            params.greedy
            and params.repetition_penalty == 1
            and params.logprobs is None
            and self._prompt_is_scored
        )

    @property
    def _prompt_is_scored(self) -> bool:
        """Whether nothing of the prompt is left to score."""
        scored = self._prompt_logprobs
        return scored is None or len(scored) == self._prompt_length

    def take(self, rows: Tensor, argmax_only: bool, timeline: StepTimeline | None = None) -> None:
        """Go on by what a step gave, and hold what is new for the stream until it is released.

        Args:
            rows: logits after the last of the computed tokens, float32 [R, V], from `wanted_from`
                on; or the most likely token, int64 [R].
            timeline: of the step, for the chunk that comes of it.

        Raises:
            CqilError: a logit is NaN or infinite.
        """
        if timeline is not None and self.pending:
            self.stream.hold(Chunk("", (), timeline=timeline))
        first = self.computed - len(rows)
        last = len(self.tokens) - 1
        for position, row in enumerate(rows, first):
            if position < self._prompt_length - 1:
                self._score_prompt(position + 1, row)
            elif position == last:
                self._go_on(row, argmax_only, timeline)

    def _go_on(self, row: Tensor, argmax_only: bool, timeline: StepTimeline | None) -> None:
        self.setbacks = 0
        if self._ending is not None:
            self._end(self._ending, timeline=timeline)
        elif argmax_only:
            self._advance(chosen(row), timeline)
        else:
            sampled = self._sampler.sample(row, self.tokens, len(self.generated))
            self._advance(sampled, timeline)

    def _score_prompt(self, position: int, logits_V: Tensor) -> None:
        check_finite(logits_V, f"prompt token {position}")
        assert self._prompt_logprobs is not None, "else nobody wants these logits"
        assert self.params.prompt_logprobs is not None, "as it is"
        token_id = self.tokens[position]
        entry = scored(logits_V, token_id, self.params.prompt_logprobs)
        self._prompt_logprobs.append(self._described(entry))

    def _advance(self, sampled: SampledToken, timeline: StepTimeline | None) -> None:
        self.tokens.append(sampled.token_id)
        self._token_times.append(time.perf_counter())
        logprobs = self._record_logprob(sampled)
        text, ending = self._outcome(sampled.token_id)
        self._text.append(text)
        if ending is not None:
            self._end(ending, (sampled.token_id,), logprobs, timeline)
        elif not self._final_only:
            self.stream.hold(Chunk(text, (sampled.token_id,), logprobs, timeline=timeline))

    def replay(self, token_ids: Sequence[int]) -> None:
        """Take up a stream that broke off: append output tokens that its reader already has.

        The reader has their text too, and nothing of it is given again. Where they end the
        request, the stream gives its last chunk at once, or when the prompt has been scored. One
        that asks for no output has none to go on from.
        """
        for token_id in () if self._ending is not None else token_ids:
            self.tokens.append(token_id)
            self._token_times.append(time.perf_counter())
            text, ending = self._outcome(token_id)
            self._text.append(text)
            if ending is not None:
                self._ending = ending
                if self._prompt_is_scored:
                    self._end(ending)
                    self.stream.release()
                return

    def lose_cache(self) -> None:
        """Its keys and values are gone: all its tokens are to be computed again."""
        self.computed = 0

    def abort(self) -> None:
        """End the stream with what there is."""
        rest = self._detokenizer.finish()
        self._text.append(rest)
        self._end(_Ending(rest, "abort"))
        self.stream.release()

    def fail(self, error: CqilError) -> None:
        """End the stream with an error."""
        self.finished = True
        self.stream.hold(error)
        self.stream.release()

    def _outcome(self, token_id: int) -> tuple[str, _Ending | None]:
        """The text that this token makes final, and how it ends the request, if it does."""
        if token_id in self._eos_token_ids:
            ending = _Ending(self._detokenizer.finish(), "stop")
        elif token_id in self.params.stop_token_ids:
            ending = _Ending(self._detokenizer.finish(), "stop", token_id)
        else:
            text = self._detokenizer.push(token_id)
            if self._detokenizer.stopped_by is not None:
                ending = _Ending(text, "stop", self._detokenizer.stopped_by)
            elif len(self.generated) >= self.params.max_tokens or len(self.tokens) >= self._max_len:
                ending = _Ending(text + self._detokenizer.finish(), "length")
            else:
                return text, None
        return ending.text, ending

    def _end(
        self,
        ending: _Ending,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
        timeline: StepTimeline | None = None,
    ) -> None:
        self.finished = True
        completion = Completion(
            text="".join(self._text),
            token_ids=self.generated,
            finish_reason=ending.reason,
            usage=Usage(self._prompt_length, len(self.generated)),
            timings=self._timings(),
            logprobs=None if self.params.logprobs is None else tuple(self._logprobs),
            seed=self._sampler.seed,
            stop_reason=ending.stop_reason,
            prompt_logprobs=None if self._prompt_logprobs is None else tuple(self._prompt_logprobs),
            prompt_text=self._prompt_text,
        )
        text = ending.text
        if self._final_only:
            text, token_ids, logprobs = completion.text, completion.token_ids, completion.logprobs
        reasons = (ending.reason, ending.stop_reason)
        self.stream.hold(Chunk(text, token_ids, logprobs, *reasons, completion, timeline))

    def _timings(self) -> Timings:
        times = self._token_times
        gaps = [1000 * (after - before) for before, after in pairwise(times)]
        return Timings(ttft_ms=gaps[0] if gaps else 0.0, itl_ms=tuple(gaps[1:]))

    def _record_logprob(self, sampled: SampledToken) -> tuple[TokenLogprob, ...] | None:
        if sampled.logprob is None:
            return None
        entry = self._described(sampled)
        self._logprobs.append(entry)
        return (entry,)

    def _described(self, sampled: SampledToken) -> TokenLogprob:
        text_of = self._detokenizer.token_text
        top = tuple(TokenLogprob(id, text_of(id), value) for id, value in sampled.top)
        return TokenLogprob(sampled.token_id, text_of(sampled.token_id), sampled.logprob, top)
