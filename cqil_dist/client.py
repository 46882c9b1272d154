"""Talks to a coordinator: requests out, chunks back.

Knows gRPC and nothing of Ray, torch or how the answer is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from cqil_dist.errors import CqilError, RequestError
from cqil_dist.outputs import Chunk, Completion, Status
from cqil_dist.rpc.convert import Prompt, chunk_from_wire, request_to_wire, status_from_wire
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.rpc.v1 import generation_pb2_grpc as rpc
from cqil_dist.sampling_params import SamplingParams

# gRPC's default of 4 MiB is little for a long completion with 20 alternatives a token.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),  # coordinators are cluster addresses, never behind a proxy
)


class GenerationClient:
    """A connection to one coordinator's generation service.

    Args:
        address: "host:port" of the service.
        secret: the launch's secret.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self.address = address
        self._metadata = (("authorization", f"Bearer {secret.hex()}"),)
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = rpc.GenerationServiceStub(self._channel)

    def stream(
        self, prompt: Prompt, params: SamplingParams, final_only: bool = False
    ) -> Iterator[Chunk]:
        """Chunks as they come. Closing the iterator cancels the request.

        Args:
            final_only: one chunk at the end, with everything in it.

        Raises:
            RequestError: the prompt or a sampling value is wrong.
            CqilError: the engine failed, or cannot be reached.
        """
        request = request_to_wire(prompt, params, final_only)
        try:
            call = self._stub.Generate(request, metadata=self._metadata)
        except ValueError as error:
            raise CqilError(f"the connection to {self.address} is closed") from error
        try:
            for response in call:
                yield chunk_from_wire(response, params.logprobs is not None)
        except grpc.RpcError as error:
            raise _translated(error, self.address) from None
        finally:
            call.cancel()

    def complete(self, prompt: Prompt, params: SamplingParams) -> Completion:
        """The whole completion. Raises as `stream` does."""
        for chunk in self.stream(prompt, params, final_only=True):
            if chunk.result is not None:
                return chunk.result
        raise CqilError(f"the stream from {self.address} ended before the completion did")

    def status(self) -> Status:
        """What is served, by which ranks, and how busy it is. Raises CqilError."""
        try:
            response = self._stub.GetStatus(
                pb.GetStatusRequest(), metadata=self._metadata, timeout=30
            )
        except grpc.RpcError as error:
            raise _translated(error, self.address) from None
        except ValueError as error:
            raise CqilError(f"the connection to {self.address} is closed") from error
        return status_from_wire(response)

    def close(self) -> None:
        """Cancel what is running and close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _translated(error: Any, address: str) -> CqilError:
    details = error.details()
    if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
        return RequestError(details)
    return CqilError(f"coordinator at {address}: {details} ({error.code().name})")
