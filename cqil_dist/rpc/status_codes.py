"""Maps the package's errors to gRPC status codes, and codes to errors."""

from __future__ import annotations

from typing import Any

import grpc

from cqil_dist.errors import (
    CqilError,
    ModelNotFound,
    QueueFull,
    RequestError,
    RequestTimeout,
    ServiceUnavailable,
    Unauthenticated,
)

_CODES: dict[type[CqilError], grpc.StatusCode] = {
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RequestTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    ServiceUnavailable: grpc.StatusCode.UNAVAILABLE,
}
_MOST_CHARACTERS = 2000
_ERRORS = {code: error for error, code in _CODES.items()}


def code_of(error: CqilError) -> grpc.StatusCode:
    """Get the code of an error; INTERNAL where the fault is not in what was asked."""
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


def details_of(error: CqilError) -> str:
    """Cut an error's message to the length that a call's trailing metadata have room for."""
    return str(error)[:_MOST_CHARACTERS]


def error_of(failed: Any, address: str) -> CqilError:
    """Make the error for a failed call (a `grpc.RpcError`) to the service at `address`."""
    details = failed.details() or "no details"
    kind = _ERRORS.get(failed.code(), CqilError)
    if kind is RequestTimeout:
        return RequestTimeout("the request's deadline has passed")
    if kind not in (ServiceUnavailable, CqilError):
        return kind(details)  # the service's own words
    return kind(f"service at {address}: {details} ({failed.code().name})")
