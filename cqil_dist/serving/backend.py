"""The coordinator as the public servers see it: both pass every request on through a `Backend`."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from cqil_dist.client import AsyncClient
from cqil_dist.errors import CqilError, RequestError, ServiceUnavailable
from cqil_dist.outputs import Chunk, Completion
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.serving.admission import Admission
from cqil_dist.status import ModelInfo, Status, find_model

logger = logging.getLogger(__name__)

_ANSWER_S = 5.0
_LONGEST_ID = 128
# Added to a request's timeout, for its client to read the rest of an answer that came just in time.
_READING_S = 10.0


@dataclass(frozen=True)
class Backend:
    """The coordinator's service, and the limits under which requests are passed on to it.

    Attributes:
        client: a client of the coordinator's service.
        models: the served models; requests that name none get the first.
        timeout_s: most seconds that a request may take.
    """

    client: AsyncClient
    models: Sequence[ModelInfo]
    admission: Admission
    timeout_s: float

    @property
    def longest_s(self) -> float:
        """Return the most seconds that a call may last, its client's time to read it included."""
        return self.timeout_s + _READING_S

    def model(self, name: str) -> ModelInfo:
        """Return the served model of this name, or the first for "". Raises ModelNotFound."""
        return find_model(self.models, name)

    async def stream(
        self,
        request: pb.GenerateRequest,
        on_let_in: Callable[[], Awaitable[None]],
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of a request's completion, which goes on after the coordinator restarts.

        Args:
            request: what to generate; it is given a `request_id` where it has none.
            on_let_in: awaited once, when the coordinator has accepted the request.
            timeout_s: the caller's own limit; it counts where it is shorter than the backend's.

        Raises:
            CqilError: as `AsyncClient.stream` does; ServiceUnavailable if this service is ending.
        """
        if not request.request_id:
            request.request_id = f"gen-{uuid.uuid4().hex}"
        if len(request.request_id) > _LONGEST_ID or not request.request_id.isprintable():
            raise RequestError(f"request_id must be printable, {_LONGEST_ID} characters at most")
        bound_s = self.timeout_s if timeout_s is None else min(timeout_s, self.timeout_s)
        ending = "cancelled"
        result: Completion | None = None
        started = time.monotonic()
        try:
            with self.admission.admitted(request.request_id):
                async with aclosing(self.client.stream(request, bound_s, on_let_in)) as chunks:
                    async for chunk in chunks:
                        self.admission.check_not_aborted_late(chunk.finish_reason)
                        result = chunk.result
                        ending = chunk.finish_reason or ending
                        yield chunk
        except CqilError as error:
            ending = _for_log(error)
            raise
        finally:
            _log_request(request, ending, result, time.monotonic() - started)

    async def status(self) -> Status:
        """Get the engine's state, ranks and load. Raises ServiceUnavailable if none come in 5 s."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self.client.status()
        except TimeoutError:
            raise ServiceUnavailable("the coordinator does not answer; it may be restarting") from (
                None
            )


def _for_log(error: CqilError) -> str:
    """Describe an error by kind and message; a RequestError, which may quote a prompt, by kind."""
    kind = type(error).__name__
    return kind if isinstance(error, RequestError) else f"{kind}: {error}"


def _log_request(
    request: pb.GenerateRequest, ending: str, result: Completion | None, seconds: float
) -> None:
    fields: dict[str, object] = {
        "request_id": request.request_id,
        "model": request.model[:_LONGEST_ID],
        "ending": ending,
        "seconds": round(seconds, 4),
    }
    if result is not None:
        fields["prompt_tokens"] = result.usage.prompt_tokens
        fields["completion_tokens"] = result.usage.completion_tokens
        fields["ttft_ms"] = round(result.timings.ttft_ms, 2)
    details = ", ".join(f"{name} {value!r}" for name, value in list(fields.items())[1:])
    logger.info("request %s: %s", request.request_id, details, extra={"fields": fields})
