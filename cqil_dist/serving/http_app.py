"""The HTTP app: the OpenAI API, health, metrics, status, and the page that compares two plans."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, PlainTextResponse

from cqil_dist.errors import ServiceUnavailable
from cqil_dist.serving.backend import Backend
from cqil_dist.serving.health import HealthWatch
from cqil_dist.serving.http_errors import error_responses, install_error_handlers
from cqil_dist.serving.http_limits import BoundedBody, RequestLog, RequireKey
from cqil_dist.serving.openai_api.routes import openai_routes
from cqil_dist.serving.serve_config import ServeConfig

_WEB = Path(__file__).parent / "web"
_PAGE = {"": "index.html", "page.css": "page.css", "page.js": "page.js", "drawing.js": "drawing.js"}
_WITH_KEY = ("/v1", "/status")
# The page loads nothing from other hosts, and talks to this service alone.
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def create_app(
    backend: Backend,
    health: HealthWatch,
    config: ServeConfig,
    metrics: Callable[[], Awaitable[str]],
) -> FastAPI:
    """Make the ASGI app of the HTTP port; `metrics` returns metrics in Prometheus' text format."""
    app = FastAPI(
        title="cqil_dist",
        description="OpenAI-compatible generation over a distributed engine.",
        docs_url=None,  # FastAPI's pages of documentation load scripts from other hosts
        redoc_url=None,
    )
    install_error_handlers(app)
    app.include_router(openai_routes(backend))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_class=PlainTextResponse, responses=error_responses(503))
    async def is_healthy() -> str:
        """Status 200 if requests should be sent to this service."""
        if backend.admission.draining:
            raise ServiceUnavailable("the server is ending")
        if not health.serving:
            raise ServiceUnavailable(health.detail)
        return "ok"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> str:
        """The metrics of the coordinator and all ranks, in Prometheus' text format."""
        return await metrics()

    @app.get("/status", responses=error_responses(401, 503))
    async def status() -> dict[str, Any]:
        """The engine's ranks, load and recoveries, and the served models with their plans."""
        found = (await backend.status()).to_dict()
        return {**found, "models": [vars(model) for model in backend.models]}

    for path, name in _PAGE.items():
        app.add_api_route(f"/{path}", _file(name), methods=["GET", "HEAD"], include_in_schema=False)

    app.openapi_schema = _documented(app, config)
    # The middleware that is added last sees a request first.
    app.add_middleware(
        BoundedBody,
        prefix="/v1",
        max_bytes=config.max_body_bytes,
        timeout_s=config.body_timeout_s,
    )
    app.add_middleware(RequireKey, key=config.api_key, prefixes=_WITH_KEY)
    app.add_middleware(RequestLog)
    return app


def _file(name: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return FileResponse(_WEB / name, headers=_PAGE_HEADERS)

    return answer


def _documented(app: FastAPI, config: ServeConfig) -> dict[str, Any]:
    """Return FastAPI's OpenAPI document, with error bodies, keys and streams as they really are."""
    document = app.openapi()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # invalid requests are answered with 400 here
            for status, answer in operation["responses"].items():
                if status >= "400":  # errors are JSON even where the endpoint's answer is text
                    (content,) = answer["content"].values()
                    answer["content"] = {"application/json": content}
            if config.api_key is not None and path.startswith(_WITH_KEY):
                operation["security"] = [{"key": []}]
    if config.api_key is not None:
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["key"] = {"type": "http", "scheme": "bearer"}
    for name in ("/v1/completions", "/v1/chat/completions"):
        answers = document["paths"][name]["post"]["responses"]["200"]["content"]
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        answers["text/event-stream"] = {"schema": event}
    return document
