"""`cqil verify`: is the distributed runtime exact for this model and plan?"""

from __future__ import annotations

from typing import Any

import typer

from cqil_dist.cli import options
from cqil_dist.progress import ConsoleProgress


@options.launch_options("device", "gpus_per_rank", "dtype", "prefill_tokens")
def verify(
    launching: dict[str, Any],
    model: options.Model,
    plan: options.PlanText = "sequential",
    ranks: options.Ranks = None,
) -> None:
    """Compare distributed generation with the in-process reference, and that with transformers.

    Runs in float32 on CPUs, where equality means equal tokens. Exits with 1 if a check fails.
    """
    from cqil_dist.checks.verify import PREFILL_TOKENS, verify_exactness
    from cqil_dist.launching.running_engine import launch
    from cqil_dist.store.store import resolve

    progress = ConsoleProgress()
    path = resolve(model, progress)
    failed = 0
    with launch(
        model,
        plan,
        ranks,
        device="cpu",
        dtype="float32",
        prefill_tokens=PREFILL_TOKENS,
        progress=progress,
        **launching,
    ) as engine:
        typer.echo(f"{model}, plan {engine.plan}, {engine.assignment.world} ranks, float32")
        for check in verify_exactness(engine, path, launching["adapter"]):
            typer.echo(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}")
            failed += not check.passed
    if failed:
        raise typer.Exit(1)
