"""`cqil bench`: measurements of models under plans, and of services under load."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cqil_dist.benchmarks.serve.load import Load
from cqil_dist.cli import options

app = typer.Typer(no_args_is_help=True, help="Measure latency and throughput.")


@app.command()
def latency(
    model: options.Model = "smollm2-135m",
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", "-p", help="Concurrent plans; repeatable."),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Ranks of the concurrent plans.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 32,
    output_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    address: options.Address = None,
    strategy: options.Strategy = "PACK",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON and PNG.")] = Path(
        "latency"
    ),
) -> None:
    """Per-token latency: transformers, the sequential plan on 1 rank, concurrent plans.

    With --address over the nodes of a cluster, all configurations loaded side by side (transformers
    on this node); --strategy STRICT_SPREAD gives every rank a node of its own.
    """
    from cqil_dist.benchmarks.latency import Case, measure
    from cqil_dist.benchmarks.machine import machine
    from cqil_dist.benchmarks.report import print_tables, write_plot
    from cqil_dist.planning.report import write_report
    from cqil_dist.records import headed, write_record

    results, layers, nodes = measure(
        Case(model, device, dtype, prompt_tokens, output_tokens),
        plan or ["P2 S12 E28 D0", "P2 S12 E28 D1", "P2 S12 E28 Dfull"],
        ranks,
        repeats,
        address,
        strategy,
    )
    setting = {
        "model": model,
        "dtype": dtype,
        "device": device,
        "nodes": nodes,
        "threads_per_rank": 1,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "repeats": repeats,
        **machine(device),
    }
    report = headed(
        "latency",
        setting=setting,
        layer_times_ms=None if layers is None else asdict(layers),
        results=[result.to_dict() for result in results],
    )
    print_tables(report)
    write_record(output / "latency.json", report)
    write_plot(report, output / "latency.png")
    typer.echo(f"written: {output}/latency.json, latency.png, {write_report(output).name}")


@app.command()
@options.options_of(Load, "asked")
def serve(
    asked: dict[str, Any],
    base_url: Annotated[
        str, typer.Option(help="Address of any OpenAI-compatible server, with or without /v1.")
    ] = "http://127.0.0.1:8000",
    max_concurrency: Annotated[
        list[str] | None,
        typer.Option(help="Most requests at once: 8, or 1,4,16 in turns; default: any."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="CQIL_API_KEY", show_envvar=True, help="Bearer token.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="With TLS: take any certificate.")
    ] = False,
    ca_cert: Annotated[
        Path | None, typer.Option(help="With TLS: PEM file of the authority to believe.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for serve.json.")] = Path(
        "serve"
    ),
) -> None:
    """Latency and throughput of any OpenAI-compatible server, as its clients see them.

    Options and figures are those of vLLM's benchmark of the same name where it has them. Latencies
    count from when a request was sent; with a finite --request-rate, how long it waited for that is
    reported beside. Ctrl-C reports what there is so far.
    """
    from rich.console import Console

    from cqil_dist.benchmarks.machine import machine
    from cqil_dist.benchmarks.serve.measure import measure
    from cqil_dist.benchmarks.serve.summary import report
    from cqil_dist.benchmarks.serve.tables import print_report
    from cqil_dist.benchmarks.serve.target import Target
    from cqil_dist.progress import ConsoleProgress
    from cqil_dist.records import write_record

    target = Target(base_url, api_key, insecure, ca_cert)
    load = Load(max_concurrency=_bounds(max_concurrency), **asked)
    measurement = measure(target, load, ConsoleProgress())
    found = report(target, load, measurement, machine("cpu"))
    print_report(found, Console())
    write_record(output / "serve.json", found)
    typer.echo(f"written: {output / 'serve.json'}")
    if measurement.interrupted:
        raise typer.Exit(130)
    if not any(result["completed"] for result in found["results"]):
        raise typer.Exit(1)


def _bounds(given: list[str] | None) -> tuple[int | None, ...]:
    """Read --max-concurrency; where none is given, there is one run without a bound."""
    try:
        bounds = tuple(int(part) for text in given or () for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"--max-concurrency takes whole numbers by comma: {error}"
        ) from error
    return bounds or (None,)
