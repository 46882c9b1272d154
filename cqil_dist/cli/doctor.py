"""`cqil doctor`: would a launch work on this cluster, and what is to be mended?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cqil_dist.cli import options
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.progress import ConsoleProgress

if TYPE_CHECKING:
    from cqil_dist.checks.doctor import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


@options.launch_options(serving=True)
def doctor(
    launching: dict[str, Any],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to be launched; default: none.")
    ] = None,
    plan: options.PlanText = "sequential",
    ranks: options.Ranks = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check every node and every link of a cluster before launching.

    Versions, model files, memory, GPUs, and for each pair of nodes, in both directions, whether
    ranks can connect and how fast. Exits with 1 if a launch would fail.
    """
    from cqil_dist.checks.doctor import diagnose
    from cqil_dist.launching.placement import connected
    from cqil_dist.launching.resolve import ResolvedLaunch

    progress = ConsoleProgress()
    config = LaunchConfig(model or "", plan, ranks, **launching)
    wanted = ResolvedLaunch.of(config, progress) if model else None
    local_cpus = wanted.actors * config.threads_per_rank if wanted else 1
    with connected(config.address, local_cpus, config.verbose):
        findings = list(diagnose(wanted, progress))
    failures = sum(finding.verdict == "failure" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"failures": failures, "findings": [asdict(f) for f in findings]}))
    else:
        _print(findings, failures)
    if failures:
        raise typer.Exit(1)


def _print(findings: Sequence[Finding], failures: int) -> None:
    table = Table("where", "check", "", "found")
    for finding in findings:
        colour = _COLOURS[finding.verdict]
        table.add_row(
            finding.where, finding.check, f"[{colour}]{finding.verdict}[/{colour}]", finding.detail
        )
    console = Console()
    console.print(table)
    if failures:
        console.print(f"[red]{failures} to mend before launching[/red]")
    else:
        console.print("[green]ready to launch[/green]")
