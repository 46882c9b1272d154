"""One request's answer: noted as bytes and the moments they came, and read when the run has ended.

Reading JSON would take the event loop's time from the other streams, so `record` interprets
nothing. `read` knows server-sent events and the answers of the OpenAI API, as strictly as needed
and no further: servers differ in what they send before the first text and after the last.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

# Text of a chat's delta: the answer, or what a reasoning model thinks before it (under the names of
# vLLM and of llama.cpp); it streams in either.
_DELTA_TEXTS = ("content", "reasoning", "reasoning_content")
_LONGEST_MESSAGE = 300


@dataclass
class Recording:
    """An answer as it came. Moments are `time.perf_counter` seconds.

    Attributes:
        due_s: when the request was to be sent.
        sent_s: when it was sent; latencies count from here.
        ended_s: when its answer had come, or failed.
        status: of HTTP; None where no headers came.
        pieces: when bytes came, and which.
        error: why there is no whole answer, as far as the connection knows; None if there is one.
    """

    due_s: float
    sent_s: float
    ended_s: float = 0.0
    status: int | None = None
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


async def record(
    client: httpx.AsyncClient, request: httpx.Request, timeout_s: float, due_s: float
) -> Recording:
    """Send a request and note its answer. What goes wrong is noted as well, not raised.

    Args:
        timeout_s: most seconds for the whole answer.
        due_s: when it was to be sent, which may be past.
    """
    recording = Recording(due_s, sent_s=time.perf_counter())
    try:
        async with asyncio.timeout(timeout_s):
            async with aclosing(await client.send(request, stream=True)) as response:
                recording.status = response.status_code
                async for piece in response.aiter_raw():
                    recording.pieces.append((time.perf_counter(), piece))
    except TimeoutError:
        recording.error = f"no whole answer within {timeout_s:g} s"
    except (httpx.HTTPError, OSError) as error:
        recording.error = reason(error)
    recording.ended_s = time.perf_counter()
    return recording


def reason(error: Exception) -> str:
    """What went wrong with a connection; several of httpx's errors carry no text of their own."""
    return f"{type(error).__name__}: {error}".rstrip(": ")


@dataclass
class Answer:
    """What a recording says.

    Attributes:
        due_s, sent_s, ended_s: as of the `Recording`.
        text_s: when each event that brought text came. Events are not tokens: one may bring
            several.
        usage: counts of tokens, by the API's names; empty where the server gives none.
        failure: why it does not count; None where it does.
    """

    due_s: float
    sent_s: float
    ended_s: float
    text_s: list[float] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    failure: str | None = None

    @property
    def output_tokens(self) -> int:
        """By the server's usage, else the events with text."""
        return self.usage.get("completion_tokens", len(self.text_s))

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
    answer = Answer(recording.due_s, recording.sent_s, recording.ended_s)
    if recording.status not in (200, None):
        answer.failure = f"HTTP {recording.status}: {_message(recording)}".rstrip(": ")
        return answer
    try:
        answer.failure = _read_events(recording, answer)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        answer.failure = f"an event is not of the OpenAI API: {error}"
    if recording.error is not None:
        answer.failure = f"midway: {recording.error}" if recording.pieces else recording.error
    return answer


def _read_events(recording: Recording, answer: Answer) -> str | None:
    """Find the text's moments and the usage; returns why the stream does not count, if so."""
    events, finished = 0, False
    for at, data in _events(recording.pieces):
        events += 1
        if data == b"[DONE]":
            finished = True
            continue
        event = json.loads(data)
        if event.get("error"):
            return f"an event brought an error: {_told(event)}"
        if usage := event.get("usage"):  # so far, where it comes with every event
            answer.usage = {name: n for name, n in usage.items() if isinstance(n, int)}
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if choice.get("text") or any(delta.get(name) for name in _DELTA_TEXTS):
                answer.text_s.append(at)
            finished = finished or bool(choice.get("finish_reason"))
    if not events:
        return f"no events in the answer: {_message(recording)}".rstrip(": ")
    if not finished:
        return "the stream ended with neither a finish_reason nor [DONE]"
    return None if answer.text_s else "no text: the model ended at once (see --ignore-eos)"


def _events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Data of the events, with the moment at which each was there.

    Every event of the OpenAI API is one `data:` line; comments and other fields are passed over.
    """
    rest, at = b"", 0.0
    for at, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from ((at, line[5:].strip()) for line in lines if line.startswith(b"data:"))
    if rest.startswith(b"data:"):
        yield at, rest[5:].strip()


def _message(recording: Recording) -> str:
    body = b"".join(piece for _, piece in recording.pieces)
    try:
        return _told(json.loads(body))
    except ValueError:
        return _told(body.decode(errors="replace"))


def _told(error: Any) -> str:
    """The message in one line, from any of the shapes that servers give errors."""
    for name in ("error", "message", "detail"):
        if isinstance(error, dict):
            error = error.get(name) or error
    return " ".join(str(error).split())[:_LONGEST_MESSAGE]
