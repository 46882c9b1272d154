"""Injects faults at random moments while requests stream, and compares every token.

    python bench/chaos.py --minutes 10 [--faults kill,stop,link,coordinator] [--spares 1]

Needs root on Linux. tests/faults/chaos.py tells how the hosts and the load are set up.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from faults.chaos import FAULTS, RANKS, ChaosReport, Injected, run_chaos
from faults.hosts import Network

from cqil_dist.benchmarks.machine import machine
from cqil_dist.progress import ConsoleProgress
from cqil_dist.records import write_record
from cqil_dist.store.store import resolve


def main(
    minutes: Annotated[float, typer.Option(help="How long to inject faults.")] = 5.0,
    faults: Annotated[str, typer.Option(help="Kinds of faults, separated by commas.")] = ",".join(
        FAULTS
    ),
    seed: Annotated[int, typer.Option(help="Seed of the faults and their moments.")] = 0,
    model: Annotated[str, typer.Option("--model", "-m")] = "smollm2-135m",
    plan: Annotated[str, typer.Option("--plan", "-p")] = "P2 S12 E28 D1",
    spares: Annotated[int, typer.Option(help="Standby actors.")] = 0,
    streams: Annotated[int, typer.Option(help="Requests at a time.")] = 4,
    step_deadline_s: Annotated[float, typer.Option(help="Until a stuck rank is lost.")] = 1.0,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("chaos.json"),
) -> None:
    """Inject faults for some minutes, and compare every token."""
    chosen = faults.split(",")
    options: dict[str, Any] = {
        "spares": spares,
        "streams": streams,
        "step_deadline_s": step_deadline_s,
        "minutes": minutes,
        "seed": seed,
    }
    if unknown := sorted(set(chosen) - set(FAULTS)):
        raise typer.BadParameter(f"{', '.join(unknown)}; known faults: {', '.join(FAULTS)}")
    console = Console()
    path = resolve(model, ConsoleProgress())

    def show(injected: Injected) -> None:
        console.print(f"{injected.fault:12} recovered in {injected.seconds:6.2f} s")

    with Network(4) as network:
        network.start_ray()
        report = run_chaos(network, str(path), plan, faults=chosen, on_fault=show, **options)
    _print(report, console)
    setting = {"model": model, "plan": plan, "ranks": RANKS, **options, **machine("cpu")}
    write_record(output, {"setting": setting, **report.to_dict()})
    if report.failed or report.wrong or report.lost or report.doubled:
        raise typer.Exit(1)


def _print(report: ChaosReport, console: Console) -> None:
    table = Table("fault", "times", "median to recover", "longest")
    for fault, values in report.to_dict()["recovery"].items():
        table.add_row(
            fault, str(values["count"]), f"{values['median_s']:.2f} s", f"{values['max_s']:.2f} s"
        )
    console.print(table)
    console.print(
        f"{report.requests} requests, {len(report.failed)} failed; {report.compared} tokens "
        f"compared: {report.lost} lost, {report.doubled} doubled, {report.wrong} wrong"
    )
    for message in report.failed[:5]:
        console.print(f"failed: {message}", markup=False)


if __name__ == "__main__":
    typer.run(main)
