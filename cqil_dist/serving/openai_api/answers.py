"""Responses of the OpenAI API, whole or as events of a stream, made from the service's answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cqil_dist.outputs import Chunk, Completion, TokenLogprob
from cqil_dist.outputs import Usage as TokenCounts
from cqil_dist.serving.openai_api import schema


@dataclass(frozen=True)
class Head:
    """The fields that every event of a response repeats."""

    id: str
    created: int
    model: str


class Answerer(Protocol):
    """The maker of one endpoint's responses: whole, or as the events of a stream."""

    def whole(self, completions: Sequence[Completion], usage: schema.Usage) -> Any:
        """Make the whole response, with one completion for each choice, in order."""
        ...

    def opening(self, index: int) -> Any | None:
        """Make the event that begins a choice's stream before its first token, or return None."""
        ...

    def event(self, index: int, chunk: Chunk) -> Any:
        """Make the event that carries the next chunk of a choice."""
        ...

    def closing(self, usage: schema.Usage) -> Any:
        """Make the event that carries the usage, after all choices have ended."""
        ...


def usage_of(counts: Iterable[TokenCounts], choices_per_prompt: int) -> schema.Usage:
    """Add up the usage of a response from these token counts of its choices, in order.

    A prompt counts once, however many choices it has.
    """
    counts = list(counts)
    prompt = sum(count.prompt_tokens for count in counts[::choices_per_prompt])
    completion = sum(count.completion_tokens for count in counts)
    return schema.Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )


def _common(part: Chunk | Completion, wants_token_ids: bool) -> dict[str, Any]:
    """Return the fields of a choice that completions and chat completions have in common."""
    fields: dict[str, Any] = {"finish_reason": part.finish_reason, "stop_reason": part.stop_reason}
    if wants_token_ids:
        fields["token_ids"] = list(part.token_ids)
    if isinstance(part, Chunk) and part.timeline is not None:
        fields["timeline"] = part.timeline.to_dict()
    return fields


@dataclass
class CompletionAnswerer:
    """The maker of the responses of /v1/completions."""

    head: Head
    wants_token_ids: bool
    # By choice: the characters in the texts of its tokens so far.
    _offsets: dict[int, int] = field(default_factory=dict)

    def whole(
        self, completions: Sequence[Completion], usage: schema.Usage
    ) -> schema.CompletionResponse:
        choices = [self._choice(index, each) for index, each in enumerate(completions)]
        return schema.CompletionResponse(choices=choices, usage=usage, **vars(self.head))

    def opening(self, index: int) -> None:
        """Return None: no event precedes a completion's first token."""

    def event(self, index: int, chunk: Chunk) -> schema.CompletionResponse:
        choice = schema.CompletionChoice(
            index=index,
            text=chunk.text,
            logprobs=self._logprobs(index, chunk.logprobs),
            **_common(chunk, self.wants_token_ids),
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
            **_common(completion, self.wants_token_ids),
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
    """Return the log probabilities of the most likely tokens and the chosen one, by their texts.

    Where tokens share a text, the likeliest counts. Returns None for a prompt's first token.
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
    """The maker of the responses of /v1/chat/completions."""

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
            **_common(chunk, self.wants_token_ids),
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
            **_common(completion, self.wants_token_ids),
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
    # A token that is a part of a character shows as the replacement character; its bytes are lost.
    known = "\N{REPLACEMENT CHARACTER}" not in entry.token
    return {
        "token": entry.token,
        "logprob": entry.logprob,
        "bytes": list(entry.token.encode()) if known else None,
    }
