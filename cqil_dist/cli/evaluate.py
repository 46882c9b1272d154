"""`cqil eval`: how good a model is under a plan, beside the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cqil_dist.cli import options
from cqil_dist.errors import TextError
from cqil_dist.planning.measure.compute_config import ComputeConfig
from cqil_dist.progress import ConsoleProgress

if TYPE_CHECKING:
    from cqil_dist.planning.evaluation.evaluate import Evaluation


@options.compute_options
def evaluate(
    computing: ComputeConfig,
    model: options.Model,
    plan: options.PlanText = "sequential",
    adapter: options.Adapter = None,
    ppl: Annotated[
        list[Path] | None, typer.Option("--ppl", help="Text file for perplexity; again for more.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="By comma: files NAME.jsonl, or names of such in --task-dir."),
    ] = None,
    task_dir: Annotated[
        Path, typer.Option("--task-dir", help="Folder of tasks.", envvar="CQIL_TASK_DIR")
    ] = Path(),
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Items of each task; default: all.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=1, help="Tokens of each text, in windows at random; default: all."
        ),
    ] = None,
    window: options.Window = 512,
    seed: options.Seed = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON here.")] = None,
) -> None:
    """Perplexity and task accuracy of a plan and of the original on the same items.

    Intervals are of 95 %; the last column compares item by item, which is sharper than comparing
    the two before it.
    """
    from cqil_dist.planning.evaluation.evaluate import evaluate as evaluate_plan
    from cqil_dist.planning.evaluation.tasks import read_task
    from cqil_dist.planning.measure.measured_model import MeasuredModel
    from cqil_dist.planning.provenance import refuse_seen_text
    from cqil_dist.planning.report import write_report
    from cqil_dist.recommended.record import note_missing_compensation
    from cqil_dist.records import require_file, write_record

    if output is not None:
        require_file(output)
    names = [name.strip() for name in (tasks or "").split(",")]
    read = [read_task(_task_file(name, task_dir), limit) for name in names if name]
    if not ppl and not read:
        raise TextError("nothing to evaluate on: give --ppl FILE, or --tasks NAME,NAME")
    measured = MeasuredModel.of(model, computing, ConsoleProgress())
    texts = [measured.windows([file], window, tokens, seed) for file in ppl or []]
    parsed = measured.plan(plan)
    merged = None if adapter is None else measured.adapter(adapter, parsed)
    if merged is None:
        note_missing_compensation(plan, model, measured.progress)
    refuse_seen_text(texts, plan, model, None if merged is None else merged.plan)
    evaluation = evaluate_plan(measured, parsed, merged, texts, read)
    Console().print(_table(evaluation))
    if output is not None:
        write_record(output, evaluation.to_json())
        typer.echo(f"written: {output}, {write_report(output.parent)}", err=True)


def _task_file(name: str, folder: Path) -> Path:
    file = Path(name) if name.endswith(".jsonl") else folder / f"{name}.jsonl"
    if not file.is_file():
        raise TextError(
            f"no task {name!r}: there is no file {file}; name the folder of your tasks with "
            "--task-dir, or use lm-eval with the model class cqil_dist.planning.evaluation.lm_eval"
        )
    return file


def _table(evaluation: Evaluation) -> Table:
    from cqil_dist.planning.evaluation.intervals import difference_text

    adapter = f", adapter {evaluation.adapter}" if evaluation.adapter else ""
    table = Table(
        "measure",
        "of",
        "on",
        "original",
        "plan",
        "plan against original",
        title=f"{evaluation.model}, {evaluation.plan}{adapter}",
    )
    for result in evaluation.results:
        paired = result.paired
        table.add_row(
            result.measure,
            result.of.name,
            result.of.items,
            str(paired.original),
            str(paired.other),
            difference_text(result.measure, paired.difference),
        )
    return table
