"""From what the service gives back to the OpenAI API's answers, whole or in events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cqil_dist.outputs import Chunk, Completion, TokenLogprob
from cqil_dist.outputs import Usage as TokenCounts
from cqil_dist.serving.openai_api import schema


@dataclass(frozen=True)
class Head:
    """What every part of an answer says of it."""

    id: str
    created: int
    model: str


class Answerer(Protocol):
    """Puts one endpoint's answers together."""

    def whole(self, completions: Sequence[Completion], usage: schema.Usage) -> Any:
        """The answer, of one completion for each choice."""
        ...

    def opening(self, index: int) -> Any | None:
        """What a choice's stream begins with, before its first token; None for nothing."""
        ...

    def event(self, index: int, chunk: Chunk) -> Any:
        """What is new of a choice."""
        ...

    def closing(self, usage: schema.Usage) -> Any:
        """The usage, after all choices have ended."""
        ...


def usage_of(counts: Iterable[TokenCounts], choices_per_prompt: int) -> schema.Usage:
    """Tokens of all choices, in order; a prompt counts once however many choices it has."""
    counts = list(counts)
    prompt = sum(count.prompt_tokens for count in counts[::choices_per_prompt])
    completion = sum(count.completion_tokens for count in counts)
    return schema.Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )


def _ending(of: Chunk | Completion) -> dict[str, Any]:
    return {"finish_reason": of.finish_reason, "stop_reason": of.stop_reason}


@dataclass
class CompletionAnswerer:
    """Of /v1/completions."""

    head: Head
    wants_token_ids: bool
    # How long the text of each choice is so far, in its tokens' own texts.
    _offsets: dict[int, int] = field(default_factory=dict)

    def whole(
        self, completions: Sequence[Completion], usage: schema.Usage
    ) -> schema.CompletionResponse:
        choices = [self._choice(index, each) for index, each in enumerate(completions)]
        return schema.CompletionResponse(choices=choices, usage=usage, **vars(self.head))

    def opening(self, index: int) -> None:
        """Nothing comes before the first token."""

    def event(self, index: int, chunk: Chunk) -> schema.CompletionResponse:
        choice = schema.CompletionChoice(
            index=index,
            text=chunk.text,
            logprobs=self._logprobs(index, chunk.logprobs),
            token_ids=list(chunk.token_ids) if self.wants_token_ids else None,
            timeline=None if chunk.timeline is None else chunk.timeline.to_dict(),
            **_ending(chunk),
        )
        return schema.CompletionResponse(choices=[choice], **vars(self.head))

    def closing(self, usage: schema.Usage) -> schema.CompletionResponse:
        return schema.CompletionResponse(choices=[], usage=usage, **vars(self.head))

    def _choice(self, index: int, completion: Completion) -> schema.CompletionChoice:
        logprobs = completion.logprobs
        if logprobs is not None and completion.prompt_logprobs is not None:
            logprobs = completion.prompt_logprobs + logprobs
        return schema.CompletionChoice(
            index=index,
            text=(completion.prompt_text or "") + completion.text,
            logprobs=self._logprobs(index, logprobs),
            token_ids=list(completion.token_ids) if self.wants_token_ids else None,
            **_ending(completion),
        )

    def _logprobs(
        self, index: int, entries: tuple[TokenLogprob, ...] | None
    ) -> schema.CompletionLogprobs | None:
        if entries is None:
            return None
        offset = self._offsets.get(index, 0)
        offsets: list[int] = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry.token)
        self._offsets[index] = offset
        return schema.CompletionLogprobs(
            tokens=[entry.token for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[_alternatives(entry) for entry in entries],
            text_offset=offsets,
        )


def _alternatives(entry: TokenLogprob) -> dict[str, float] | None:
    """The most likely tokens, and the one that was taken; of several with one text, the likeliest.

    None for a prompt's first token.
    """
    if entry.logprob is None:
        return None
    found: dict[str, float] = {}
    for each in (*entry.top, entry) if entry.top else ():
        if each.logprob is not None:
            found.setdefault(each.token, each.logprob)
    return found


@dataclass
class ChatAnswerer:
    """Of /v1/chat/completions."""

    head: Head
    wants_token_ids: bool

    def whole(
        self, completions: Sequence[Completion], usage: schema.Usage
    ) -> schema.ChatCompletionResponse:
        choices = [self._choice(index, each) for index, each in enumerate(completions)]
        return schema.ChatCompletionResponse(choices=choices, usage=usage, **vars(self.head))

    def opening(self, index: int) -> schema.ChatCompletionChunk:
        delta = schema.Delta(role="assistant", content="")
        return self._chunk([schema.ChatChunkChoice(index=index, delta=delta)])

    def event(self, index: int, chunk: Chunk) -> schema.ChatCompletionChunk:
        choice = schema.ChatChunkChoice(
            index=index,
            delta=schema.Delta(content=chunk.text) if chunk.text else schema.Delta(),
            logprobs=_chat_logprobs(chunk.logprobs),
            token_ids=list(chunk.token_ids) if self.wants_token_ids else None,
            timeline=None if chunk.timeline is None else chunk.timeline.to_dict(),
            **_ending(chunk),
        )
        return self._chunk([choice])

    def closing(self, usage: schema.Usage) -> schema.ChatCompletionChunk:
        return self._chunk([], usage)

    def _chunk(
        self, choices: list[schema.ChatChunkChoice], usage: schema.Usage | None = None
    ) -> schema.ChatCompletionChunk:
        return schema.ChatCompletionChunk(choices=choices, usage=usage, **vars(self.head))

    def _choice(self, index: int, completion: Completion) -> schema.ChatChoice:
        return schema.ChatChoice(
            index=index,
            message=schema.AnswerMessage(content=completion.text),
            logprobs=_chat_logprobs(completion.logprobs),
            token_ids=list(completion.token_ids) if self.wants_token_ids else None,
            **_ending(completion),
        )


def _chat_logprobs(entries: tuple[TokenLogprob, ...] | None) -> schema.ChatLogprobs | None:
    if entries is None:
        return None
    content = [
        schema.ChatLogprob(
            **_described(entry),
            top_logprobs=[schema.TopLogprob(**_described(each)) for each in entry.top],
        )
        for entry in entries
    ]
    return schema.ChatLogprobs(content=content)


def _described(entry: TokenLogprob) -> dict[str, Any]:
    # Of a part of a character only the replacement is known, not the bytes.
    known = "\N{REPLACEMENT CHARACTER}" not in entry.token
    return {
        "token": entry.token,
        "logprob": entry.logprob,
        "bytes": list(entry.token.encode()) if known else None,
    }
