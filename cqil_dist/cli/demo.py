"""`cqil demo`: the built-in model under its original plan and a concurrent one, side by side."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cqil_dist.cli import options
from cqil_dist.outputs import Completion
from cqil_dist.plan import Plan
from cqil_dist.progress import ConsoleProgress, Progress

MODEL = "smollm2-135m"
RANKS = 2
PROMPT = "The capital of France is"

PLAN = "balanced"


@dataclass(frozen=True)
class Outcome:
    """A plan's answer and what it took."""

    name: str
    plan: Plan
    exchanges_per_token: float
    completion: Completion


def demo(
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = PROMPT,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 48,
    verbose: options.Verbose = False,
) -> None:
    """Stream a completion under two plans on 2 ranks, and compare them in a table."""
    from cqil_dist.launching.placement import connected

    progress = ConsoleProgress()
    console = Console()
    with connected(None, local_cpus=RANKS, verbose=verbose) as local:
        pin = local and (os.cpu_count() or 1) >= RANKS
        outcomes = [
            _run(name, plan, prompt, max_tokens, pin, progress, console)
            for name, plan in (("original", "sequential"), ("concurrent", PLAN))
        ]
    console.print(_table(outcomes))


def _run(
    name: str,
    plan: str,
    prompt: str,
    max_tokens: int,
    pin: bool,
    progress: Progress,
    console: Console,
) -> Outcome:
    from cqil_dist.launching.running_engine import launch

    with launch(MODEL, plan, RANKS, pin=pin, progress=progress) as engine:
        # The first request touches memory that later ones find in place.
        engine.complete(prompt, max_tokens=4, temperature=0)
        console.print(f"[bold]{name}[/bold]: {prompt}", end="", highlight=False)
        completion: Completion | None = None
        for chunk in engine.generate(prompt, max_tokens=max_tokens, temperature=0):
            console.print(chunk.text, end="", highlight=False, markup=False, style="green")
            completion = chunk.result
        console.print("\n")
        assert completion is not None, "a stream that raises nothing ends with its result"
        return Outcome(name, engine.plan, engine.exchanges_per_token(), completion)


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title=f"{MODEL} on {RANKS} ranks", show_lines=True)
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.name)
    rows: list[tuple[str, list[str]]] = [
        ("serial depth", [f"{o.plan.depth} of {o.plan.num_layers}" for o in outcomes]),
        ("exchanges per token", [f"{o.exchanges_per_token:g}" for o in outcomes]),
        ("first token", [f"{o.completion.timings.ttft_ms:.1f} ms" for o in outcomes]),
        ("per token, median", [_ms(o.completion.timings.itl_p50_ms) for o in outcomes]),
        ("per token, p90", [_ms(o.completion.timings.itl_p90_ms) for o in outcomes]),
        (
            "tokens per second",
            [f"{o.completion.timings.decode_tokens_per_second or 0:.1f}" for o in outcomes],
        ),
        ("text", [o.completion.text.strip() for o in outcomes]),
    ]
    for label, cells in rows:
        table.add_row(label, *cells)
    return table


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
