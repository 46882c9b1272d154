"""Joins what the engine keeps of one request: its tokens, how they are chosen, and its answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from cqil_dist.engine.answer import Answer
from cqil_dist.engine.detokenizer import Detokenizer
from cqil_dist.engine.sampler import Sampler, check_finite, chosen, scored
from cqil_dist.engine.sequence import Sequence
from cqil_dist.inputs import GenerationInput
from cqil_dist.timeline import StepTimeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Request:
    """A request in progress: a sequence for the steps, a sampler to continue it, and its answer.

    Args:
        given: the request as it was submitted.
        prompt_ids: its prompt's tokens, one at least.
        prompt_text: the prompt as text, where it is to be given back.
        eos_token_ids: the model's end-of-sequence tokens.
        max_len: most tokens that prompt and output may have together.

    Attributes:
        sequence: what the scheduler and the steps know of it.
        answer: what its caller gets.
        stream: the answer's chunks.

    Raises:
        UnsupportedModel: the tokenizer is not backed by `tokenizers`.
    """

    def __init__(
        self,
        given: GenerationInput,
        prompt_ids: list[int],
        prompt_text: str | None,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Iterable[int],
        max_len: int,
    ) -> None:
        self._sampler = Sampler(given.params, prompt_ids)
        self._prompt_logprobs = given.params.prompt_logprobs
        self.sequence = Sequence(
            prompt_ids,
            given.plan_index,
            scores_prompt=self._prompt_logprobs is not None,
            argmax_suffices=self._sampler.argmax_suffices,
            wants_timeline=given.wants_timeline and not given.final_only,
        )
        detokenizer = Detokenizer(tokenizer, prompt_ids, given.params.stop)
        seed = self._sampler.seed
        self.answer = Answer(
            given, prompt_ids, detokenizer, eos_token_ids, max_len, seed, prompt_text
        )
        self.stream = self.answer.stream

    def replay(self, token_ids: Iterable[int]) -> None:
        """Append output tokens that the reader of a stream that broke off has already.

        The reader has their text too, and nothing of it is given again. Where they end the
        request, the stream gives its last chunk at once, or when the prompt has been scored. One
        that asks for no output has none to go on from.
        """
        if self.answer.ending is not None:
            return
        for token_id in token_ids:
            self.sequence.append(token_id)
            self.answer.append(token_id)
            if self.answer.ending is not None:
                break
        if self.answer.ending is not None and not self.sequence.unscored:
            self.answer.end()
            self.stream.release()

    def take(self, logits: Tensor, argmax_only: bool, timeline: StepTimeline | None = None) -> None:
        """Go on with the result of a step; what is new is held until the stream is released.

        Args:
            logits: those wanted after the last of the computed tokens, float32 [R, V]; or, with
                `argmax_only`, the most likely tokens, int64 [R].
            timeline: of the step, for the chunk that comes of it.

        Raises:
            CqilError: a logit is NaN or infinite.
        """
        sequence, answer = self.sequence, self.answer
        if timeline is not None and sequence.pending:
            answer.add_timeline(timeline)
        if sequence.unscored:
            self._score_prompt(logits)
        if sequence.pending:
            return
        if answer.ending is not None:
            answer.end(timeline=timeline)
            return
        if argmax_only:
            sampled = chosen(logits[-1])
        else:
            sampled = self._sampler.sample(logits[-1], sequence.token_ids, len(answer.token_ids))
        sequence.append(sampled.token_id)
        answer.add(sampled, timeline)

    def _score_prompt(self, logits_RV: Tensor) -> None:
        """Tell the answer how probable the prompt's next tokens are."""
        assert self._prompt_logprobs is not None, "else nothing of the prompt is unscored"
        sequence = self.sequence
        first = sequence.computed - len(logits_RV) + 1
        for position, logits_V in enumerate(logits_RV[: sequence.unscored], first):
            check_finite(logits_V, f"prompt token {position}")
            token = scored(logits_V, sequence.token_ids[position], self._prompt_logprobs)
            self.answer.add_prompt_logprob(token)
            sequence.unscored -= 1
