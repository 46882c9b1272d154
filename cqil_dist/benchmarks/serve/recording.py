"""One request as it went over the wire: bytes and the moments they came. Interprets nothing.

Reading JSON would take the event loop's time from the other streams, so this only notes; `answer`
reads when the run has ended.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import httpx


@dataclass
class Recording:
    """Moments are `time.perf_counter` seconds.

    Attributes:
        due_s: when the request was to be sent.
        sent_s: when it was sent; latencies count from here.
        ended_s: when its answer had come, or failed.
        status: of HTTP; None where no headers came.
        content_type: of the answer; "" where it has none.
        pieces: when bytes came, and which.
        error: why there is no whole answer, as far as the connection knows; None if there is one.
    """

    due_s: float
    sent_s: float = 0.0
    ended_s: float = 0.0
    status: int | None = None
    content_type: str = ""
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


async def record(
    client: httpx.AsyncClient, request: httpx.Request, timeout_s: float, due_s: float | None = None
) -> Recording:
    """Send a request and note its answer. What goes wrong is noted as well, not raised.

    Args:
        timeout_s: most seconds for the whole answer.
        due_s: when it was to be sent; None for now.
    """
    sent_s = time.perf_counter()
    recording = Recording(due_s=sent_s if due_s is None else due_s, sent_s=sent_s)
    try:
        async with asyncio.timeout(timeout_s):
            await _note(client, request, recording)
    except TimeoutError:
        recording.error = f"no whole answer within {timeout_s:g} s"
    except (httpx.HTTPError, OSError) as error:
        recording.error = reason(error)
    recording.ended_s = time.perf_counter()
    return recording


async def _note(client: httpx.AsyncClient, request: httpx.Request, recording: Recording) -> None:
    response = await client.send(request, stream=True)
    try:
        recording.status = response.status_code
        recording.content_type = response.headers.get("content-type", "")
        async for piece in response.aiter_raw():
            recording.pieces.append((time.perf_counter(), piece))
    finally:
        await response.aclose()


def reason(error: Exception) -> str:
    """What went wrong with a connection; several of httpx's errors carry no text of their own."""
    return f"{type(error).__name__}: {error}".rstrip(": ")
