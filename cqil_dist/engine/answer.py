"""Turns the output tokens of a request into what its caller gets: chunks, and a completion.

It knows the detokenizer and what ends an output; it knows nothing of logits, steps or slots.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cqil_dist.engine.chunk_stream import ChunkStream
from cqil_dist.engine.detokenizer import Detokenizer
from cqil_dist.engine.sampler import SampledToken
from cqil_dist.errors import CqilError
from cqil_dist.inputs import GenerationInput
from cqil_dist.outputs import Chunk, Completion, FinishReason, Timings, TokenLogprob, Usage
from cqil_dist.timeline import StepTimeline


@dataclass(frozen=True)
class Ending:
    """The reason why an output ends, and the text that its end makes final."""

    text: str
    reason: FinishReason
    stop_reason: str | int | None = None


class Answer:
    """The output of one request, told chunk by chunk.

    Args:
        given: the request.
        prompt_ids: the prompt's tokens, one at least.
        detokenizer: has seen the prompt, and knows the stop strings.
        eos_token_ids: the model's end-of-sequence tokens.
        max_len: most tokens that prompt and output may have together.
        seed: what the request's draws depend on.
        prompt_text: the prompt as text, where it is to be given back.

    Attributes:
        stream: the chunks, for the caller to iterate over.
        token_ids: the output so far.
        arrived: when the request came, seconds of `time.perf_counter`.
        ending: how the output ends, once it takes no further token; None before.
        finished: whether the stream has been given its last chunk, or an error.
    """

    def __init__(
        self,
        given: GenerationInput,
        prompt_ids: Sequence[int],
        detokenizer: Detokenizer,
        eos_token_ids: Iterable[int],
        max_len: int,
        seed: int,
        prompt_text: str | None = None,
    ) -> None:
        params = given.params
        self.stream = ChunkStream()
        self.token_ids: list[int] = []
        self.finished = False
        self._final_only = given.final_only
        self._seed = seed
        self._prompt_text = prompt_text
        self._prompt_length = len(prompt_ids)
        self._max_tokens = min(params.max_tokens, max_len - len(prompt_ids))
        self._detokenizer = detokenizer
        # What each token that ends the output is told as: the model's own are not told.
        self._end_tokens: dict[int, str | int | None] = {t: t for t in params.stop_token_ids}
        if not params.ignore_eos:
            self._end_tokens |= dict.fromkeys(eos_token_ids)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._prompt_logprobs: list[TokenLogprob] | None = None
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [self._described(SampledToken(prompt_ids[0]))]
        # An output of no tokens ends as soon as its prompt has been computed.
        self.ending = Ending("", "length") if params.max_tokens == 0 else None
        self.arrived = time.perf_counter()
        self._token_times = [self.arrived]  # and then one entry per token

    def add(self, sampled: SampledToken, timeline: StepTimeline | None = None) -> None:
        """Take the next token of the output, and hold the chunk that comes of it.

        Args:
            timeline: of the step that computed it, for the chunk.
        """
        text = self.append(sampled.token_id)
        logprobs = None
        if self._logprobs is not None:
            logprobs = (self._described(sampled),)
            self._logprobs += logprobs
        if self.ending is not None:
            self.end((sampled.token_id,), logprobs, timeline)
        elif not self._final_only:
            self.stream.held.append(Chunk(text, (sampled.token_id,), logprobs, timeline=timeline))

    def append(self, token_id: int) -> str:
        """Take the next token of the output without a chunk; returns the text it makes final."""
        self.token_ids.append(token_id)
        self._token_times.append(time.perf_counter())
        reason: FinishReason | None = "stop"
        if token_id in self._end_tokens:
            text, stop_reason = "", self._end_tokens[token_id]
        else:
            text, stop_reason = self._detokenizer.push(token_id), self._detokenizer.stopped_by
            if stop_reason is None:
                reason = "length" if len(self.token_ids) >= self._max_tokens else None
        if reason is not None:
            text += self._detokenizer.finish()
            self.ending = Ending(text, reason, stop_reason)
        self._text.append(text)
        return text

    def add_prompt_logprob(self, scored: SampledToken) -> None:
        """Note how probable the next token of the prompt is under the model."""
        assert self._prompt_logprobs is not None, "else nobody asks"
        self._prompt_logprobs.append(self._described(scored))

    def add_timeline(self, timeline: StepTimeline) -> None:
        """Hold a chunk without tokens, for a step that computed a part of the prompt."""
        self.stream.held.append(Chunk("", (), timeline=timeline))

    def end(
        self,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
        timeline: StepTimeline | None = None,
    ) -> None:
        """Hold the last chunk of an output that has its ending, with the completion in it.

        Args:
            token_ids: the tokens that no chunk before has brought, with their logprobs.
            timeline: of the step that computed them.
        """
        assert self.ending is not None, "only an output with an ending ends"
        self.finished = True
        completion = self._completion(self.ending)
        text = self.ending.text
        if self._final_only:
            text, token_ids, logprobs = completion.text, completion.token_ids, completion.logprobs
        reasons = (completion.finish_reason, completion.stop_reason)
        self.stream.held.append(Chunk(text, token_ids, logprobs, *reasons, completion, timeline))

    def abort(self) -> None:
        """End the stream at once, with the output so far and finish reason "abort"."""
        rest = self._detokenizer.finish()
        self._text.append(rest)
        self.ending = Ending(rest, "abort")
        self.end()
        self.stream.release()

    def fail(self, error: CqilError) -> None:
        """End the stream at once, with an error."""
        self.finished = True
        self.stream.held.append(error)
        self.stream.release()

    def _described(self, sampled: SampledToken) -> TokenLogprob:
        """Add the texts to a token's log-probability and to those of the alternatives."""
        text_of = self._detokenizer.token_text
        top = tuple(TokenLogprob(other, text_of(other), value) for other, value in sampled.top)
        return TokenLogprob(sampled.token_id, text_of(sampled.token_id), sampled.logprob, top)

    def _completion(self, ending: Ending) -> Completion:
        gaps = [1000 * (after - before) for before, after in pairwise(self._token_times)]
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self.token_ids),
            finish_reason=ending.reason,
            usage=Usage(self._prompt_length, len(self.token_ids)),
            timings=Timings(ttft_ms=gaps[0] if gaps else 0.0, itl_ms=tuple(gaps[1:])),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            seed=self._seed,
            stop_reason=ending.stop_reason,
            prompt_logprobs=None if self._prompt_logprobs is None else tuple(self._prompt_logprobs),
            prompt_text=self._prompt_text,
        )
