"""`cqil plan`: what a plan means for a model and its ranks, and which plan to take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cqil_dist.assignment import Assignment
from cqil_dist.cli import options
from cqil_dist.cli.setting_option import option_of
from cqil_dist.costs import ModelShape, Piece
from cqil_dist.errors import ConfigError
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.plan import layers_text
from cqil_dist.planning.measure.compute_config import ComputeConfig
from cqil_dist.planning.search.calibration import CalibrationConfig
from cqil_dist.planning.search.goal import Goal
from cqil_dist.progress import ConsoleProgress

if TYPE_CHECKING:
    from torch import Tensor

    from cqil_dist.model.config import ModelConfig
    from cqil_dist.model.precision import Precision

app = typer.Typer(no_args_is_help=True, help="Inspect plans, and find them by measurement.")


@app.command()
@options.options_of(CalibrationConfig, "calibration", CalibrationConfig)
@options.compute_options
def analyze(
    model: options.Model,
    calibration: CalibrationConfig,
    computing: ComputeConfig,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path(
        "plans"
    ),
) -> None:
    """How alike layers' inputs are, and what running each group concurrently costs.

    Measured on text that the model itself says, or on --text. An interrupted run goes on where it
    was; `cqil plan search` on the same text begins with what was measured here.
    """
    from cqil_dist.planning.measure.measured_model import MeasuredModel
    from cqil_dist.planning.plots import plot_sensitivity, plot_similarity
    from cqil_dist.planning.report import write_report
    from cqil_dist.records import require_folder, write_record

    require_folder(output)
    measured = MeasuredModel.of(model, computing, ConsoleProgress())
    _, analysis = calibration.measure(measured)
    record = analysis.to_json()
    file = output / ("analysis-compensated.json" if calibration.fit_tokens else "analysis.json")
    write_record(file, record)
    plot_similarity(record, file.with_name(f"{file.stem}-similarity.png"))
    plot_sensitivity(record, file.with_name(f"{file.stem}-sensitivity.png"))
    typer.echo(f"written: {write_report(output)}", err=True)


def _share(text: str) -> float:
    """Read 5% as 0.05, and 0.05 as itself."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError as error:
        raise typer.BadParameter(f"--max-loss takes a share such as 5% or 0.05: {error}") from error
    if text.endswith("%"):
        return number / 100
    if number >= 1:
        raise typer.BadParameter(f"--max-loss {text} is {number:.0%}; for less, write 5% or 0.05")
    return number


@app.command()
@options.options_of(Goal, "goal", left_out=("max_loss",))
@options.options_of(CalibrationConfig, "calibration", CalibrationConfig)
@options.compute_options
def search(
    model: options.Model,
    goal: dict[str, Any],
    calibration: CalibrationConfig,
    computing: ComputeConfig,
    max_loss: Annotated[
        float | None, option_of(Goal, "max_loss", parser=_share, metavar="<share>")
    ] = None,
    ranks: Annotated[
        int, typer.Option("--ranks", "-r", min=1, help="Number of ranks that share the groups.")
    ] = 2,
    link_us: Annotated[
        float,
        typer.Option("--link-us", min=0, help="Microseconds of an exchange between two ranks."),
    ] = 50.0,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", min=0, help="Seconds of refining the plan by measuring whole plans."
        ),
    ] = 600.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "plan.json"
    ),
) -> None:
    """The best plan for one goal: --depth, --max-kl, --max-loss or --max-latency-us.

    Groups are measured one by one, as `cqil plan analyze` does; dynamic programming finds the plan
    with the least sum, and local search goes on from there by measuring whole plans. Beside the
    plan is written what depth costs: searched plans, the paper's, and removed layers.
    """
    from cqil_dist.planning.measure.measured_model import MeasuredModel
    from cqil_dist.planning.plots import plot_pareto_front
    from cqil_dist.planning.report import write_report
    from cqil_dist.planning.search.latency import measure_costs
    from cqil_dist.planning.search.pareto import PlanFinder, front_json
    from cqil_dist.records import require_file, write_record

    require_file(output)
    wanted = Goal(max_loss=max_loss, **goal)
    measured = MeasuredModel.of(model, computing, ConsoleProgress())
    wanted.check(measured.config.num_layers, calibration.largest_group(ranks))
    comparison, analysis = calibration.measure(measured, ranks)
    costs = measure_costs(measured.path, link_us)
    finder = PlanFinder(
        comparison, analysis.sensitivities, costs, ranks, seconds, measured.progress
    )
    found = finder.find(wanted)
    write_record(output, found.plan_json(comparison))
    described = found.describe(comparison)
    typer.echo(f"written: {output} ({described})", err=True)
    front = [*finder.pareto_front(), *finder.published_methods(analysis.similarity_LL)]
    record = front_json(model, comparison, costs, ranks, front)
    write_record(output.with_name(f"{output.stem}-front.json"), record)
    plot_pareto_front(record, output.with_name(f"{output.stem}-front.png"))
    typer.echo(f"written: {write_report(output.parent)}", err=True)


@app.command()
@options.compute_options
def compensate(
    computing: ComputeConfig,
    model: options.Model,
    plan: options.PlanText,
    text: options.Text = None,
    tokens: options.Tokens = 20_480,
    sampled_tokens: options.SampledTokens = 0,
    window: options.Window = 512,
    held_out: options.HeldOut = 8,
    seed: options.Seed = 0,
    rank: Annotated[
        int, typer.Option("--rank", min=1, help="Directions of each map that are kept.")
    ] = 256,
    ridge: Annotated[
        float, typer.Option("--ridge", min=0, help="Penalty on the change; more is less change.")
    ] = 0.3,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path(
        "compensated"
    ),
) -> None:
    """Take back what a plan's groups get wrong by linear regression: an adapter in a minute.

    Costs nothing at run time. `cqil distill --init` goes on from there. Plans for it are found by
    `cqil plan search --fit-tokens`. Says how far the plan is from the original without it and with
    it, on windows that it is not fitted to; the plan may have been chosen on them.
    """
    from cqil_dist.model.adapter import require_adapter_folder, write_adapter
    from cqil_dist.planning.measure.grouped_model import final_hidden
    from cqil_dist.planning.measure.held_out import HeldOut
    from cqil_dist.planning.measure.measured_model import MeasuredModel
    from cqil_dist.planning.provenance import made_with
    from cqil_dist.planning.recover.compensation import Compensation
    from cqil_dist.planning.recover.training_state import STATE
    from cqil_dist.recommended.record import plan_record

    options.require_text(text, sampled_tokens)
    require_adapter_folder(output)
    if (output / STATE).is_file():
        raise ConfigError(f"{output} holds an adapter that was distilled; write to another folder")
    measured = MeasuredModel.of(model, computing, ConsoleProgress())
    parsed = measured.concurrent_plan(plan)
    read, kept = measured.windows(text or [], window, tokens, seed).split(held_out)
    windows = measured.extended(read, sampled_tokens, seed)

    def hidden(tokens_CT: Tensor) -> Tensor:
        return final_hidden(measured.model, input_ids=tokens_CT)

    unseen = HeldOut(measured.model, kept, hidden)
    before = unseen.kl(parsed.groups, hidden)
    compensation = Compensation(measured.model, windows, measured.progress, rank, ridge)
    with compensation.applied(parsed.changed, measured.progress) as merged:
        loras = merged.loras
        after = unseen.kl(parsed.groups, hidden)
    made = made_with(windows, plan_record(plan, model))
    made["fitted"] = compensation.to_json()
    made["held_out"] = {"tokens": kept.tokens, "kl_before": before, "kl_after": after}
    write_adapter(output, loras, str(measured.path), {**parsed.to_json(), "measured": made})
    typer.echo(
        f"written: {output} (held-out KL {after:.4f} nats a token; without it {before:.4f})",
        err=True,
    )
    if not after < before:
        measured.progress.note(
            "it does not help on text that it was not fitted to: fit to more text (--tokens) or "
            "change less (a larger --ridge)"
        )


@app.command()
def show(
    plan: Annotated[str, typer.Argument(help="'sequential', notation, JSON, or a JSON file.")],
    model: options.Model,
    ranks: options.Ranks = None,
    ungrouped: options.Ungrouped = "own",
    compare: options.Compare = None,
    dtype: options.Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Groups, serial depth, ideal reduction, exchanges, and what each rank holds."""
    from cqil_dist.launching.resolve import ResolvedLaunch

    config = LaunchConfig(model, plan, ranks, compare, ungrouped=ungrouped, dtype=dtype)
    resolved = ResolvedLaunch.of(config, ConsoleProgress())
    assignment, parsed = resolved.assignment, resolved.assignment.plan
    assignments = resolved.assignments
    precision = config.precision_for(resolved.model, on_gpu=False)
    held = [_held(assignments, rank, resolved.model, precision) for rank in range(assignment.world)]
    if as_json:
        summary = {
            "plan": parsed.to_json(),
            "depth": parsed.depth,
            "ideal_reduction": parsed.ideal_reduction,
            "exchanges_per_token": assignment.rounds,
            "ranks": held,
        }
        if resolved.compared_note:
            summary["compared"] = resolved.compared_note
        typer.echo(json.dumps(summary))
        return
    console = Console()
    for each in assignments:
        console.print(_groups_table(each))
    console.print(_ranks_table(held))
    console.print(
        f"serial depth {parsed.depth} of {parsed.num_layers} layers, ideal reduction "
        f"{parsed.ideal_reduction:.1%}, {assignment.rounds} exchanges per token on "
        f"{assignment.world} ranks"
    )


def _held(
    assignments: Sequence[Assignment], rank: int, config: ModelConfig, precision: Precision
) -> dict[str, Any]:
    from cqil_dist.model.footprint import footprint

    assignment = assignments[0]
    rows = assignment.head_rows[rank]
    return {
        "rank": rank,
        "layers": list(assignment.layers_of(rank)),
        "shards": [_shard(piece) for piece in _shards(assignment, rank, config.shape)],
        "vocabulary_rows": [rows.start, rows.stop],
        **asdict(footprint(assignments, rank, config, precision)),
    }


def _shards(assignment: Assignment, rank: int, shape: ModelShape) -> list[Piece]:
    """Return the pieces of a rank that are less than a whole layer, in layer order."""
    held = [piece for stage in assignment.stages for piece in stage.pieces[rank]]
    return [piece for piece in held if piece != shape.whole(piece.layer)]


def _shard(piece: Piece) -> dict[str, Any]:
    return {
        "layer": piece.layer,
        "heads": [piece.heads.start, piece.heads.stop],
        "columns": [piece.columns.start, piece.columns.stop],
    }


def _groups_table(assignment: Assignment) -> Table:
    title = f"Groups of {assignment.plan}"
    table = Table("group", "layers", "bypass", "ranks", "exchanges", title=title)
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
    table = Table(
        "rank", "layers", "shards", "vocabulary rows", "weights", "KV per token", title="Ranks"
    )
    for rank in held:
        first, last = rank["vocabulary_rows"]
        split = {shard["layer"] for shard in rank["shards"]}
        table.add_row(
            str(rank["rank"]),
            layers_text([layer for layer in rank["layers"] if layer not in split]),
            _shards_text(rank["shards"]),
            f"{first}-{last - 1}",
            f"{rank['weight_bytes'] / 1e6:.1f} MB",
            f"{rank['kv_bytes_per_token'] / 1e3:.1f} kB",
        )
    return table


def _shards_text(shards: list[dict[str, Any]]) -> str:
    """Write split layers and what is held of them: "0-9: heads 0-4, columns 0-767"."""
    lines: dict[str, list[int]] = {}
    for shard in shards:
        (first_head, heads), (first_column, columns) = shard["heads"], shard["columns"]
        what = [f"heads {first_head}-{heads - 1}"] if heads > first_head else []
        what += [f"columns {first_column}-{columns - 1}"] if columns > first_column else []
        lines.setdefault(", ".join(what), []).append(shard["layer"])
    return "\n".join(f"{layers_text(layers)}: {what}" for what, layers in lines.items())
