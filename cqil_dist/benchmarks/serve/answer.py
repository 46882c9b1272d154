"""What a recorded answer said: its text's moments, its token counts, or why it failed.

Knows server-sent events and the answers of the OpenAI API, as strictly as needed and no further:
peers differ in what they send before the first text and after the last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from cqil_dist.benchmarks.serve.recording import Recording

# Text of a chat's delta: the answer, or what a reasoning model thinks before it (under the names of
# vLLM and of llama.cpp); it streams in either.
_DELTA_TEXTS = ("content", "reasoning", "reasoning_content")
_LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class Answer:
    """One request's answer. Moments are `time.perf_counter` seconds.

    Attributes:
        due_s, sent_s, ended_s, status: as of the `Recording`.
        text_s: when each event that brought text came. Events are not tokens: one may bring
            several.
        prompt_tokens, completion_tokens: of the usage; None where the peer gives none.
        failure: why it does not count; None where it does.
    """

    due_s: float
    sent_s: float
    ended_s: float
    status: int | None
    text_s: tuple[float, ...]
    prompt_tokens: int | None
    completion_tokens: int | None
    failure: str | None

    @property
    def output_tokens(self) -> int:
        """By the peer's usage, else the events with text."""
        return len(self.text_s) if self.completion_tokens is None else self.completion_tokens

    @property
    def queueing_ms(self) -> float:
        """From the moment it was due until it was sent, milliseconds."""
        return 1000 * (self.sent_s - self.due_s)

    @property
    def ttft_ms(self) -> float:
        """Time to first token: until the first event with text, milliseconds."""
        return 1000 * (self.text_s[0] - self.sent_s)

    @property
    def e2el_ms(self) -> float:
        """End-to-end latency: until the end of the stream, milliseconds."""
        return 1000 * (self.ended_s - self.sent_s)

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first, milliseconds; None where there is one at most."""
        after_first = self.output_tokens - 1
        return 1000 * (self.text_s[-1] - self.text_s[0]) / after_first if after_first > 0 else None

    @property
    def itl_ms(self) -> list[float]:
        """Gaps between events with text, milliseconds."""
        return [1000 * (after - before) for before, after in pairwise(self.text_s)]


def read(recording: Recording) -> Answer:
    """Interpret a recording. Whatever it holds, this raises nothing: it may be a failure."""
    stream = _Stream()
    if recording.status == 200:
        try:
            stream.read(recording.pieces)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            stream.error = f"an event is not of the OpenAI API: {error}"
    return Answer(
        due_s=recording.due_s,
        sent_s=recording.sent_s,
        ended_s=recording.ended_s,
        status=recording.status,
        text_s=tuple(stream.text_s),
        prompt_tokens=stream.usage.get("prompt_tokens"),
        completion_tokens=stream.usage.get("completion_tokens"),
        failure=_failure(recording, stream),
    )


@dataclass
class _Stream:
    """An event stream's content, gathered event by event."""

    text_s: list[float] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    events: int = 0
    finished: bool = False
    error: str | None = None

    def read(self, pieces: Iterable[tuple[float, bytes]]) -> None:
        for at, data in _events(pieces):
            self.events += 1
            if data == b"[DONE]":
                self.finished = True
            else:
                self._take(at, json.loads(data))

    def _take(self, at: float, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = f"an event brought an error: {_told(event)}"
        # Some send the usage so far with every event; the last one has it all.
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices") or ():
            if _has_text(choice):
                self.text_s.append(at)
            if choice.get("finish_reason"):
                self.finished = True


def _events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Data of the events, with the moment at which each was there.

    Every event of the OpenAI API is one `data:` line; comments and other fields are passed over.
    """
    rest, last = b"", 0.0
    for at, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at, line[5:].strip()
        last = at
    if rest.startswith(b"data:"):
        yield last, rest[5:].strip()


def _has_text(choice: dict[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in _DELTA_TEXTS)


def _failure(recording: Recording, stream: _Stream) -> str | None:
    if recording.status is not None and recording.status != 200:
        body = b"".join(piece for _, piece in recording.pieces)
        return f"HTTP {recording.status}: {_message(body)}".rstrip(": ")
    if recording.error is not None:
        return f"midway: {recording.error}" if recording.pieces else recording.error
    if stream.error is not None:
        return stream.error
    if not stream.events:
        return f"no events in an answer of type {recording.content_type or 'unknown'}"
    if not stream.finished:
        return "the stream ended with neither a finish_reason nor [DONE]"
    return None if stream.text_s else "no text: the model ended at once (see --ignore-eos)"


def _message(body: bytes) -> str:
    """An error's body in one line."""
    try:
        told = json.loads(body)
    except ValueError:
        told = body.decode(errors="replace")
    text = _told(told) if isinstance(told, dict) else str(told)
    return " ".join(text.split())[:_LONGEST_MESSAGE]


def _told(body: dict[str, Any]) -> str:
    """The message in any of the shapes that servers give errors."""
    error = body.get("error")
    if isinstance(error, dict):
        error = error.get("message")
    return str(error or body.get("message") or body.get("detail") or body)[:_LONGEST_MESSAGE]
