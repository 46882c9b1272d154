"""`cqil bench`: latency measurements."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cqil_dist.cli import options

app = typer.Typer(no_args_is_help=True, help="Measure latency.")


@app.callback()
def _bench() -> None:
    """Keeps `latency` a subcommand while it is the only one."""


@app.command()
def latency(
    model: Annotated[str, typer.Option("--model", "-m")] = "smollm2-135m",
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", "-p", help="Concurrent plans; repeatable."),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Ranks of the concurrent plans.")] = 2,
    prompt_tokens: Annotated[int, typer.Option()] = 32,
    output_tokens: Annotated[int, typer.Option()] = 64,
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
    from cqil_dist.benchmarks.report import print_tables, write_json, write_plot

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
    report = {
        "setting": setting,
        "layer_times_ms": None if layers is None else asdict(layers),
        "results": [result.to_dict() for result in results],
    }
    print_tables(report)
    write_json(report, output / "latency.json")
    write_plot(report, output / "latency.png")
    typer.echo(f"written: {output / 'latency.json'}, {output / 'latency.png'}")
