"""`cqil trace`: where one request's time went, as a trace for Perfetto or Chrome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cqil_dist.cli.chrome_trace import chrome_trace
from cqil_dist.client import Client
from cqil_dist.plan import Plan
from cqil_dist.status import find_model
from cqil_dist.timeline import StepTimeline


def trace(
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    server: Annotated[
        str, typer.Option(help="host:port (gRPC) of a running `cqil serve`.")
    ] = "localhost:50051",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model of the server to ask; default: its first.")
    ] = "",
    api_key: Annotated[
        str | None, typer.Option(envvar="CQIL_API_KEY", show_envvar=True, help="The server's key.")
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="The server speaks TLS.")] = False,
    ca_cert: Annotated[
        Path | None, typer.Option(help="PEM file to check its certificate against.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 16,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "trace.json"
    ),
) -> None:
    """Write one request's timeline: per rank and group, attention, feed-forward and exchanges.

    Open the file at ui.perfetto.dev or chrome://tracing. On GPUs a traced step waits for every
    part, and is slower for it.
    """
    with Client(server, api_key=api_key, tls=tls, ca_cert=ca_cert) as client:
        served = find_model(client.models(), model)
        timelines = _timelines(client, served.name, prompt, max_tokens)
        names = {
            rank.rank: f"rank {rank.rank} ({rank.device} on {rank.address})"
            for rank in client.status().ranks
        }
    plan = Plan.parse(served.plan, served.plan["num_layers"])
    output.write_text(json.dumps(chrome_trace(timelines, plan, names)), encoding="utf-8")
    typer.echo(f"written: {output} ({len(timelines)} steps); open it at ui.perfetto.dev")


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
