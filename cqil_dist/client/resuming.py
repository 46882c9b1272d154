"""Lets a stream outlive its connection. This module knows no socket and does no waiting.

A stream that breaks goes on elsewhere, or at the same address later, with the tokens that have
come: the service computes none of them anew for the reader, and gives none twice. That is safe
because the same prompt, values and seed make the same tokens.
"""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import grpc

from cqil_dist.errors import CqilError, RequestTimeout
from cqil_dist.outputs import Chunk, Completion, Timings, TokenLogprob
from cqil_dist.rpc.convert import chunk_from_wire
from cqil_dist.rpc.status_codes import error_of
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.sampling_params import SamplingParams

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
# gRPC cannot count to timeouts much longer than this, which is three years.
_FOR_EVER_S = 1e8


class Backoff:
    """A rule for how long to wait before a call that found nobody is made again.

    Args:
        patience_s: seconds after the first such call before giving up.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._broken_since: float | None = None
        self._let_in_before = False
        self._wait_s = _FIRST_WAIT_S

    def next_wait_s(self, error: Any, let_in: bool, address: str) -> float:
        """Work out the seconds to wait before the next call, with jitter.

        Args:
            error: what the call failed with, a `grpc.RpcError`.
            let_in: whether the service had let the request in before.

        Raises:
            CqilError: what the call asked was refused, or patience has ended.
        """
        code = error.code()
        # A service that has just come back may be full of those who came back first.
        again = code is grpc.StatusCode.UNAVAILABLE or (
            self._let_in_before and code is grpc.StatusCode.RESOURCE_EXHAUSTED
        )
        if let_in:  # somebody was there
            self._let_in_before = True
            self._broken_since = None
            self._wait_s = _FIRST_WAIT_S
        now = time.monotonic()
        self._broken_since = self._broken_since or now
        if not again or now - self._broken_since > self._patience_s:
            raise error_of(error, address) from None
        wait_s = self._wait_s * random.uniform(0.5, 1.0)
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
        return wait_s


@dataclass
class ResumableStream:
    """The stream of one request, over as many connections as it takes.

    Args:
        request: as it was asked; a seed and a request id are drawn where it has none, so that it
            goes on as it began.
        timeout_s: seconds for all of it; None sets no limit.
    """

    request: pb.GenerateRequest
    timeout_s: float | None
    finished: bool = False
    _resumed: bool = False
    _token_ids: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    # When it was begun, then when each token came.
    _times: list[float] = field(default_factory=lambda: [time.monotonic()])

    def __post_init__(self) -> None:
        given, self.request = self.request, pb.GenerateRequest()
        self.request.CopyFrom(given)
        if not self.request.request_id:
            self.request.request_id = f"gen-{uuid.uuid4().hex[:16]}"
        sampling = self.request.sampling_params
        if not sampling.HasField("seed"):
            sampling.seed = SamplingParams().seeded().seed or 0
        self._token_ids += self.request.resume_token_ids
        self._wants_logprobs = sampling.HasField("logprobs")
        self._wants_prompt_logprobs = sampling.HasField("prompt_logprobs")

    def next_request(self) -> pb.GenerateRequest:
        """Make the request for the next connection: it goes on after the tokens that have come."""
        self._resumed = len(self._times) > 1
        del self.request.resume_token_ids[:]
        self.request.resume_token_ids.extend(self._token_ids)
        return self.request

    def remaining_s(self) -> float | None:
        """Work out the seconds left, None for no limit. Raises RequestTimeout where none are."""
        if self.timeout_s is None or self.timeout_s > _FOR_EVER_S:
            return None
        left = self.timeout_s - (time.monotonic() - self._times[0])
        if left <= 0:
            raise RequestTimeout(f"the completion was not done within {self.timeout_s:g} s")
        return left

    def take(self, response: pb.GenerateResponse) -> Chunk:
        """Take note of a response; return the chunk that the stream's reader gets."""
        chunk = chunk_from_wire(response, self._wants_logprobs, self._wants_prompt_logprobs)
        now = time.monotonic()
        self._token_ids += chunk.token_ids
        self._logprobs += chunk.logprobs or ()
        self._times += [now] * len(chunk.token_ids)
        self.finished = chunk.result is not None
        if chunk.result is None or not self._resumed:
            return chunk
        return replace(chunk, result=self._whole(chunk.result))

    def check_finished(self, address: str) -> None:
        """Raise CqilError if the service closed the stream before the completion was done."""
        if not self.finished:
            raise CqilError(f"the stream from {address} ended before the completion did")

    def _whole(self, result: Completion) -> Completion:
        """Complete the last connection's result with what only the earlier ones gave."""
        gaps = [1000 * (after - before) for before, after in pairwise(self._times)]
        return replace(
            result,
            logprobs=None if result.logprobs is None else tuple(self._logprobs),
            timings=Timings(gaps[0], tuple(gaps[1:])),
        )
