"""One request's life on the coordinator: its tokens so far, and the chunks it gives back."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from cqil_dist.errors import CqilError
from cqil_dist.outputs import Chunk, Completion, FinishReason, Timings, TokenLogprob, Usage
from cqil_dist.runtime.detokenizer import Detokenizer
from cqil_dist.runtime.sampler import SampledToken, Sampler
from cqil_dist.sampling_params import SamplingParams


class Request:
    """A prompt being continued.

    The tokens are all of its state: with `computed` set to 0 its KV cache can be filled again on
    any ranks, and it goes on where it was.

    Attributes:
        tokens: prompt and output so far.
        computed: how many of them are in the KV cache.
        slot: KV slot, or None while waiting for one.
        finished: the stream has ended.
        setbacks: losses of the model during its steps, since it last gained a token.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        sampler: Sampler,
        detokenizer: Detokenizer,
        eos_token_ids: Sequence[int],
        final_only: bool = False,
    ) -> None:
        self.tokens = list(prompt_ids)
        self.params = params
        self.computed = 0
        self.slot: int | None = None
        self.finished = False
        self.setbacks = 0
        self.stream = ChunkStream()
        self._final_only = final_only
        self._prompt_length = len(prompt_ids)
        self._sampler = sampler
        self._detokenizer = detokenizer
        self._eos_token_ids = () if params.ignore_eos else tuple(eos_token_ids)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._token_times = [time.perf_counter()]  # arrival, then one entry per token

    @property
    def pending(self) -> int:
        """Tokens that are not in the KV cache yet."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> tuple[int, ...]:
        return tuple(self.tokens[self._prompt_length :])

    @property
    def wants_argmax(self) -> bool:
        """Whether the most likely token is all it wants to know of the logits."""
        params = self.params
        return params.greedy and params.repetition_penalty == 1 and params.logprobs is None

    def choose(self, logits_V: Tensor) -> SampledToken:
        """The next token, from float32 logits [V] after the last one. Raises CqilError."""
        return self._sampler.sample(logits_V, self.tokens, len(self.generated))

    def advance(self, sampled: SampledToken, max_len: int) -> None:
        """Append a token, and hold what is new for the stream until it is released.

        Args:
            max_len: most tokens the KV slot has room for.
        """
        self.setbacks = 0
        self.tokens.append(sampled.token_id)
        self._token_times.append(time.perf_counter())
        logprobs = self._record_logprob(sampled)
        reason, stop_reason, text = self._outcome(sampled.token_id, max_len)
        self._text.append(text)
        if reason is not None:
            self._end(text, (sampled.token_id,), logprobs, reason, stop_reason)
        elif not self._final_only:
            self.stream.hold(Chunk(text, (sampled.token_id,), logprobs))

    def replay(self, token_ids: Sequence[int], max_len: int) -> None:
        """Take up a stream that broke off: append output tokens that its reader already has.

        The reader has their text too, and nothing of it is given again. Where they end the
        request, the stream gives its last chunk at once.
        """
        for token_id in token_ids:
            self.tokens.append(token_id)
            self._token_times.append(time.perf_counter())
            reason, stop_reason, text = self._outcome(token_id, max_len)
            self._text.append(text)
            if reason is not None:
                self._end(text, (), None, reason, stop_reason)
                self.stream.release()
                return

    def lose_cache(self) -> None:
        """Its keys and values are gone: all its tokens are to be computed again."""
        self.computed = 0

    def abort(self) -> None:
        """End the stream with what there is."""
        rest = self._detokenizer.finish()
        self._text.append(rest)
        self._end(rest, (), None, "abort", None)
        self.stream.release()

    def fail(self, error: CqilError) -> None:
        """End the stream with an error."""
        self.finished = True
        self.stream.hold(error)
        self.stream.release()

    def _outcome(
        self, token_id: int, max_len: int
    ) -> tuple[FinishReason | None, str | int | None, str]:
        """Whether and why this token ends the request, and the text that it makes final."""
        if token_id in self._eos_token_ids:
            return "stop", None, self._detokenizer.finish()
        if token_id in self.params.stop_token_ids:
            return "stop", token_id, self._detokenizer.finish()
        text = self._detokenizer.push(token_id)
        if self._detokenizer.stopped_by is not None:
            return "stop", self._detokenizer.stopped_by, text
        if len(self.generated) >= self.params.max_tokens or len(self.tokens) >= max_len:
            return "length", None, text + self._detokenizer.finish()
        return None, None, text

    def _end(
        self,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...] | None,
        reason: FinishReason,
        stop_reason: str | int | None,
    ) -> None:
        self.finished = True
        completion = Completion(
            text="".join(self._text),
            token_ids=self.generated,
            finish_reason=reason,
            usage=Usage(self._prompt_length, len(self.generated)),
            timings=self._timings(),
            logprobs=None if self.params.logprobs is None else tuple(self._logprobs),
            seed=self._sampler.seed,
            stop_reason=stop_reason,
        )
        if self._final_only:
            text, token_ids, logprobs = completion.text, completion.token_ids, completion.logprobs
        self.stream.hold(Chunk(text, token_ids, logprobs, reason, stop_reason, completion))

    def _timings(self) -> Timings:
        times = self._token_times
        gaps = [1000 * (after - before) for before, after in pairwise(times)]
        return Timings(ttft_ms=gaps[0] if gaps else 0.0, itl_ms=tuple(gaps[1:]))

    def _record_logprob(self, sampled: SampledToken) -> tuple[TokenLogprob, ...] | None:
        if sampled.logprob is None:
            return None
        text_of = self._detokenizer.token_text
        top = tuple(TokenLogprob(id, text_of(id), value) for id, value in sampled.top)
        entry = TokenLogprob(sampled.token_id, text_of(sampled.token_id), sampled.logprob, top)
        self._logprobs.append(entry)
        return (entry,)


class ChunkStream:
    """The chunks of one request, handed from the engine's thread to the caller's.

    What is held reaches the caller when it is released: waking the caller's thread costs the
    engine's a fraction of a millisecond, which it can spare while the ranks compute.

    Iterating ends after the chunk with a finish reason, and raises the error a request failed
    with.
    """

    def __init__(self) -> None:
        self._held: deque[Chunk | CqilError] = deque()
        self._releasing = threading.Lock()
        self._queue: queue.SimpleQueue[Chunk | CqilError] = queue.SimpleQueue()

    def hold(self, item: Chunk | CqilError) -> None:
        self._held.append(item)

    def release(self) -> None:
        with self._releasing:  # the engine's thread, and one that closes the engine
            while self._held:
                self._queue.put(self._held.popleft())

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            item = self._queue.get()
            if isinstance(item, CqilError):
                raise item
            yield item
            if item.finish_reason is not None:
                return
