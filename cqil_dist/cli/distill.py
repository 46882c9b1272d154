"""`cqil distill`: teach a model under a plan to say what it says without."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cqil_dist.cli import options
from cqil_dist.errors import ConfigError
from cqil_dist.planning.measure.compute_config import ComputeConfig
from cqil_dist.planning.recover.training_config import TrainingConfig
from cqil_dist.progress import ConsoleProgress


@options.options_of(TrainingConfig, "training", TrainingConfig)
@options.compute_options
def distill(
    training: TrainingConfig,
    computing: ComputeConfig,
    model: options.Model,
    plan: options.PlanText,
    text: options.Text = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=1,
            help="Tokens to train on; default: all of --text, or 262144 of the model's own.",
        ),
    ] = None,
    sampled_tokens: options.SampledTokens = 0,
    window: options.Window = 512,
    held_out: options.HeldOut = 8,
    init: Annotated[
        Path | None, typer.Option("--init", help="Adapter to begin with (cqil plan compensate).")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path(
        "adapter"
    ),
) -> None:
    """Train a LoRA adapter for a plan; the model without adapter and plan is the teacher.

    Writes the adapter in peft's format with the plan inside, and the loss curve. The same command
    goes on with a run that was interrupted, and ends as if it had not been.
    """
    from cqil_dist.model.adapter import CONFIG, require_adapter_folder
    from cqil_dist.planning.measure.measured_model import MeasuredModel
    from cqil_dist.planning.plots import plot_training
    from cqil_dist.planning.provenance import has_seen, made_with
    from cqil_dist.planning.recover.distillation import distill as train_adapter
    from cqil_dist.planning.recover.training_state import STATE, TrainingLog
    from cqil_dist.recommended.record import note_missing_compensation, plan_record

    options.require_text(text, sampled_tokens)
    require_adapter_folder(output)
    if (output / CONFIG).is_file() and not (output / STATE).is_file():
        raise ConfigError(
            f"{output} holds an adapter that was not distilled there; write to another folder"
        )
    progress = ConsoleProgress()
    measured = MeasuredModel.of(model, computing, progress)
    parsed = measured.concurrent_plan(plan)
    if init is not None and init.resolve() == output.resolve():
        raise ConfigError(f"--init and --output are both {output}; write to another folder")
    if init is None:
        note_missing_compensation(plan, model, progress, "--init")
    start = None if init is None else measured.adapter(init, parsed)
    read, kept = measured.windows(text or [], window, tokens, training.seed).split(held_out)
    if start is not None and has_seen(start.plan, kept):
        progress.note(f"--init {init} may have been fitted to held-out text: KL begins too low")
    train = measured.extended(read, sampled_tokens, training.seed)

    def show(log: TrainingLog) -> None:
        plot_training(log, output / "loss.png")
        steps, kl = max(log.held_out.items())
        progress.note(f"after {steps} steps: held-out KL {kl:.4f} nats a token")

    train_adapter(
        measured.model,
        parsed,
        train,
        kept,
        training,
        output,
        progress,
        teacher=f"{measured.folder.name} {measured.numerics}",
        made=made_with(train, plan_record(plan, model), None if start is None else start.plan),
        start=start,
        on_evaluation=show,
    )
    typer.echo(f"written: {output}", err=True)
