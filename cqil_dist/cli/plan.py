"""`cqil plan`: what a plan means for a model and its ranks."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cqil_dist.assignment import Assignment
from cqil_dist.cli import options
from cqil_dist.launch_config import LaunchConfig
from cqil_dist.progress import ConsoleProgress

app = typer.Typer(no_args_is_help=True, help="Inspect plans.")


@app.callback()
def _plan() -> None:
    """Keeps `show` a subcommand while it is the only one."""


@app.command()
def show(
    plan: Annotated[str, typer.Argument(help="'sequential', notation, JSON, or a JSON file.")],
    model: options.Model,
    ranks: options.Ranks = None,
    dtype: options.Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Groups, serial depth, ideal reduction, exchanges, and what each rank holds."""
    from cqil_dist.resolved_launch import ResolvedLaunch

    config = LaunchConfig(model, plan, ranks, dtype=dtype)
    resolved = ResolvedLaunch.of(config, ConsoleProgress())
    assignment, parsed = resolved.assignment, resolved.assignment.plan
    dtype = config.dtype_for(resolved.model, on_gpu=False)
    held = [_held(assignment, rank, resolved.model, dtype) for rank in range(assignment.world)]
    if as_json:
        summary = {
            "plan": parsed.to_json(),
            "depth": parsed.depth,
            "ideal_reduction": parsed.ideal_reduction,
            "exchanges_per_token": assignment.rounds,
            "ranks": held,
        }
        typer.echo(json.dumps(summary))
        return
    console = Console()
    console.print(_groups_table(assignment))
    console.print(_ranks_table(held))
    console.print(
        f"serial depth {parsed.depth} of {parsed.num_layers} layers, ideal reduction "
        f"{parsed.ideal_reduction:.1%}, {assignment.rounds} exchanges per token on "
        f"{assignment.world} ranks"
    )


def _held(assignment: Assignment, rank: int, config: Any, dtype: str) -> dict[str, Any]:
    from cqil_dist.model.footprint import footprint

    rows = assignment.head_rows[rank]
    return {
        "rank": rank,
        "layers": list(assignment.layers_of(rank)),
        "vocabulary_rows": [rows.start, rows.stop],
        **asdict(footprint([assignment], rank, config, dtype)),
    }


def _groups_table(assignment: Assignment) -> Table:
    table = Table("group", "layers", "bypass", "ranks", "exchanges", title="Groups")
    for index, stage in enumerate(assignment.stages):
        group = stage.group
        layers = str(group.layers[0])
        if group.size > 1:
            layers += f"-{group.layers[-1]}"
        rounds = (stage.attention_round is not None) + (stage.output_round is not None)
        workers = ", ".join(str(rank) for rank in stage.workers)
        bypass = str(group.bypass) if group.size > 1 else ""
        table.add_row(str(index), layers, bypass, workers, str(rounds or ""))
    return table


def _ranks_table(held: list[dict[str, Any]]) -> Table:
    table = Table("rank", "layers", "vocabulary rows", "weights", "KV per token", title="Ranks")
    for rank in held:
        first, last = rank["vocabulary_rows"]
        table.add_row(
            str(rank["rank"]),
            _runs(rank["layers"]),
            f"{first}-{last - 1}",
            f"{rank['weight_bytes'] / 1e6:.1f} MB",
            f"{rank['kv_bytes_per_token'] / 1e3:.1f} kB",
        )
    return table


def _runs(layers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
