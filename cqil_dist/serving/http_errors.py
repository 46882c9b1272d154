"""How errors are answered over HTTP: with a status, and a body of the OpenAI API's error shape."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cqil_dist.errors import (
    CqilError,
    ModelNotFound,
    QueueFull,
    RequestError,
    RequestTimeout,
    ServiceUnavailable,
    Unauthenticated,
)

logger = logging.getLogger(__name__)

_STATUSES: dict[type[CqilError], int] = {
    RequestError: 400,
    Unauthenticated: 401,
    ModelNotFound: 404,
    QueueFull: 429,
    ServiceUnavailable: 503,
    RequestTimeout: 504,
}
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}
_RETRY_AFTER_S = 1
_MOST_REPORTED = 4


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` of an endpoint that may answer with these error statuses."""
    return {status: {"model": ErrorResponse} for status in statuses}


def error_body(error: CqilError) -> ErrorResponse:
    """Make the body that tells an error of this package; a stream that fails has it as an event."""
    return _body(_status(error), str(error))


def error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    """Make an error answer, with Retry-After (429, 503) or WWW-Authenticate (401) where due."""
    headers = {"Retry-After": str(_RETRY_AFTER_S)} if status in (429, 503) else None
    if status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse(_body(status, message, param).model_dump(), status, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make the app answer whatever is raised while it handles a request in the API's shape."""

    @app.exception_handler(CqilError)
    async def own(request: Request, error: CqilError) -> JSONResponse:
        return error_response(_status(error), str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # pydantic's `input` and `ctx` are left out: they may hold values that JSON cannot.
        first = error.errors()[:_MOST_REPORTED]
        reported = [(_field_path(each, error.body), each["msg"]) for each in first]
        message = "; ".join(f"{field or 'the body'}: {why}" for field, why in reported)
        param, _ = reported[0]
        if not param:
            message += "; send a JSON object, with the header 'Content-Type: application/json'"
        return error_response(400, message, param or None)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> JSONResponse:
        answer = error_response(error.status_code, f"{request.url.path[:200]}: {error.detail}")
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> JSONResponse:
        return error_response(499, "the client has hung up")  # for the log; nobody reads it

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.exception("unexpected", exc_info=error)
        return error_response(500, "the server failed; its log says more")


def _field_path(error: dict[str, Any], value: Any) -> str:
    """Return a wrong field's dotted path in a body, without pydantic's names of union members."""
    names: list[str] = []
    for part in error["loc"][1:]:
        if isinstance(value, dict) and (part in value or error["type"] == "missing"):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            continue
        names.append(str(part))
    return ".".join(names)


def _status(error: CqilError) -> int:
    return _STATUSES.get(type(error), 500)


def _body(status: int, message: str, param: str | None = None) -> ErrorResponse:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    detail = ErrorDetail(message=message, type=kind, param=param, code=status)
    return ErrorResponse(error=detail)
