"""One request's answer: recorded as bytes with their times, and interpreted after the run.

Parsing JSON would take the event loop's time from the other streams, so `record` interprets
nothing. `read` interprets server-sent events of the OpenAI API, no more strictly than necessary:
servers differ in what they send before the first text and after the last.
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

# The text of a chat's delta: the answer, or the reasoning before it under the names that vLLM and
# llama.cpp give it.
_DELTA_TEXTS = ("content", "reasoning", "reasoning_content")
_LONGEST_MESSAGE = 300


@dataclass
class Recording:
    """An answer as it was received. Times are `time.perf_counter` seconds.

    Attributes:
        due_s: when the request was to be sent.
        sent_s: when it was sent; latencies count from here.
        ended_s: when its answer was complete, or had failed.
        status: the HTTP status; None if no headers came.
        pieces: the received bytes, each piece with its time.
        error: the connection's error if the answer is not complete, else None.
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
    """Send a request and record its answer; errors are recorded as well, and not raised.

    Args:
        timeout_s: the most seconds for the whole answer.
        due_s: when the request was to be sent, which may have passed.
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
    """Put a connection's error in words; several of httpx's have no text beside their type."""
    return f"{type(error).__name__}: {error}".rstrip(": ")


@dataclass
class Answer:
    """A recorded answer, interpreted.

    Attributes:
        due_s, sent_s, ended_s: as in the `Recording`.
        text_s: the time of each event with text. Events are not tokens: one may hold several.
        usage: numbers of tokens, by the API's names; empty if the server reports none.
        failure: why the request failed; None if it succeeded.
    """

    due_s: float
    sent_s: float
    ended_s: float
    text_s: list[float] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    failure: str | None = None

    @property
    def output_tokens(self) -> int:
        """Count the answer's tokens: by the server's usage or, without it, events with text."""
        return self.usage.get("completion_tokens", len(self.text_s))

    @property
    def queueing_ms(self) -> float:
        """Return the milliseconds from when the request was due until it was sent."""
        return 1000 * (self.sent_s - self.due_s)

    @property
    def ttft_ms(self) -> float:
        """Return time to first token: milliseconds from sending until the first event with text."""
        return 1000 * (self.text_s[0] - self.sent_s)

    @property
    def e2el_ms(self) -> float:
        """Return the end-to-end latency: milliseconds from sending to the end of the stream."""
        return 1000 * (self.ended_s - self.sent_s)

    @property
    def tpot_ms(self) -> float | None:
        """Return milliseconds per output token after the first; None for one token at most."""
        after_first = self.output_tokens - 1
        return 1000 * (self.text_s[-1] - self.text_s[0]) / after_first if after_first > 0 else None

    @property
    def itl_ms(self) -> list[float]:
        """Return the inter-token latencies: milliseconds between events with text."""
        return [1000 * (after - before) for before, after in pairwise(self.text_s)]


def read(recording: Recording) -> Answer:
    """Interpret a recording; whatever it holds, this raises no error but notes a failure."""
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
    """Note the times of text and the usage; return why the stream is a failure, if it is one."""
    events, finished = 0, False
    for at, data in _events(recording.pieces):
        events += 1
        if data == b"[DONE]":
            finished = True
            continue
        event = json.loads(data)
        if event.get("error"):
            return f"an event brought an error: {_error_text(event)}"
        if usage := event.get("usage"):  # the last counts: some servers send it with every event
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
    """Yield the data of each event, with the time at which it was complete.

    Every event of the OpenAI API is one `data:` line; comments and other fields are skipped.
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
        return _error_text(json.loads(body))
    except ValueError:
        return _error_text(body.decode(errors="replace"))


def _error_text(error: Any) -> str:
    """Return the message of an error, in any form that servers give it, as one line."""
    for name in ("error", "message", "detail"):
        if isinstance(error, dict):
            error = error.get(name) or error
    return " ".join(str(error).split())[:_LONGEST_MESSAGE]
