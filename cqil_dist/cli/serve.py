"""`cqil serve`: an engine on the network, over gRPC and the OpenAI API."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cqil_dist.cli import options
from cqil_dist.cli.setting_option import help_of
from cqil_dist.errors import LaunchError
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.progress import ConsoleProgress
from cqil_dist.serving.serve_config import ServeConfig, Tls
from cqil_dist.settings import settings_of

if TYPE_CHECKING:
    from cqil_dist.launching.running_engine import RunningEngine
    from cqil_dist.serving.server import Addresses


@options.launch_options(serving=True)
@options.options_of(ServeConfig, "facing")
def serve(
    launching: dict[str, Any],
    facing: dict[str, Any],
    model: Annotated[str, typer.Argument(help=help_of(settings_of(LaunchConfig)["model"]))],
    plan: options.PlanText = "sequential",
    ranks: options.Ranks = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file of the certificate to serve with.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Write logs as JSON, one object a line.")
    ] = False,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C, then finish what is running."""
    if facing["api_key"] is None and "CQIL_API_KEY" in os.environ:
        # An empty variable is a secret that did not arrive, not the wish to let everybody in.
        raise LaunchError("CQIL_API_KEY is empty; give it a key, or unset it to let everybody in")
    if (tls_cert is None) != (tls_key is None):
        raise LaunchError("tls_cert and tls_key belong together: give both or neither")
    tls = Tls(tls_cert, tls_key) if tls_cert and tls_key else None
    config = ServeConfig(tls=tls, **facing)
    LaunchConfig(model, plan, ranks, **launching)  # these, too, before anything is started
    config.check()
    from cqil_dist.launching.running_engine import launch
    from cqil_dist.serving.logs import configure_logging

    def announce(where: Addresses) -> None:
        typer.echo(f"gRPC {where.grpc}; HTTP {where.http}", err=True)
        if config.is_public and config.api_key is None:
            typer.echo(
                "warning: other machines can reach this service and it has no key: anybody may use "
                "it (--api-key)",
                err=True,
            )
        elif not config.is_public:
            typer.echo("reachable from this machine alone (--host 0.0.0.0 opens it)", err=True)

    with launch(model, plan, ranks, progress=ConsoleProgress(), **launching) as engine:
        configure_logging(log_json)
        asyncio.run(_serve(engine, config, announce))


async def _serve(
    engine: RunningEngine, config: ServeConfig, announce: Callable[[Addresses], None]
) -> None:
    from cqil_dist.serving.cluster_metrics import ClusterMetrics
    from cqil_dist.serving.server import Service, serve

    client = engine.service.async_client()
    try:
        await serve(Service(client, config, ClusterMetrics()), announce)
    finally:
        await client.close()
