"""`cqil trace`: where one request's time went, as a trace for Perfetto or Chrome."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from cqil_dist.cli import options
from cqil_dist.client import Client
from cqil_dist.errors import ModelNotFound, RequestError
from cqil_dist.plan import Plan
from cqil_dist.progress import ConsoleProgress
from cqil_dist.status import ModelInfo
from cqil_dist.timeline import StepTimeline
from cqil_dist.tracing import chrome_trace


@options.launch_options()
def trace(
    launching: dict[str, Any],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="To launch; or one of the server's, its first if none."),
    ] = None,
    plan: options.PlanText = "sequential",
    ranks: options.Ranks = None,
    server: Annotated[
        str | None,
        typer.Option(help="host:port (gRPC) of a running service to trace; none is launched then."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="CQIL_API_KEY", help="Its key.")] = None,
    tls: Annotated[bool, typer.Option("--tls", help="It serves with TLS.")] = False,
    ca_cert: Annotated[Path | None, typer.Option(help="PEM file to check it against.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 16,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "trace.json"
    ),
) -> None:
    """Write one request's timeline: per rank and group, attention, feed-forward and exchanges.

    Open the file at ui.perfetto.dev or chrome://tracing. On GPUs a traced step waits for every
    part, and is slower for it.
    """
    with ExitStack() as stack:
        if server is not None:
            client = Client(server, api_key=api_key, tls=tls, ca_cert=ca_cert)
            stack.enter_context(client)
            served = _served(client, model)
        else:
            if model is None:
                raise RequestError("give a model to launch (--model) or a service (--server)")
            from cqil_dist.api import launch

            engine = launch(model, plan, ranks, progress=ConsoleProgress(), **launching)
            client = stack.enter_context(engine).client
            client.generate(prompt, max_tokens=2)  # the first finds memory untouched
            served = _served(client, None)
        timelines = _timelines(client, served.name, prompt, max_tokens)
        names = {
            rank.rank: f"rank {rank.rank} ({rank.device} on {rank.address})"
            for rank in client.status().ranks
        }
    parsed = Plan.parse(served.plan, served.plan["num_layers"])
    output.write_text(json.dumps(chrome_trace(timelines, parsed, names)), encoding="utf-8")
    typer.echo(f"written: {output} ({len(timelines)} steps); open it at ui.perfetto.dev")


def _served(client: Client, name: str | None) -> ModelInfo:
    models = client.models()
    for model in models:
        if name is None or model.name == name:
            return model
    raise ModelNotFound(
        f"the service has no model {name!r} but {', '.join(model.name for model in models)}"
    )


def _timelines(client: Client, model: str, prompt: str, max_tokens: int) -> list[StepTimeline]:
    chunks = client.generate(
        prompt,
        stream=True,
        timeline=True,
        model=model,
        max_tokens=max_tokens,
        temperature=0,
        ignore_eos=True,
    )
    return [chunk.timeline for chunk in chunks if chunk.timeline is not None]
