"""Options that several subcommands share: how to launch a model."""

from __future__ import annotations

from typing import Annotated

import typer

from cqil_dist.progress import ConsoleProgress, Progress

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Built-in name, local directory, GGUF file, or hub id (org/name)."
    ),
]
PlanText = Annotated[
    str,
    typer.Option(
        "--plan",
        "-p",
        help="'sequential', 'P2 S12 E28 D1' (D: 0, 1, ..., full, parallel), JSON, or a JSON file.",
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option("--ranks", "-r", help="Layer actors; default: layers of the largest group."),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="Ray cluster; default: RAY_ADDRESS, else a local cluster is started."
    ),
]
Strategy = Annotated[
    str, typer.Option("--strategy", help="PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.")
]
Threads = Annotated[
    int, typer.Option("--threads-per-rank", help="Compute threads of a rank on a CPU.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
GpusPerRank = Annotated[
    float, typer.Option("--gpus-per-rank", help="Below 1 lets ranks share a GPU.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, float16 or bfloat16.")]
Slots = Annotated[int, typer.Option("--slots", help="Requests that run at the same time.")]
MaxLen = Annotated[
    int | None,
    typer.Option("--max-len", help="Most tokens of a prompt and its completion together."),
]
Spares = Annotated[int, typer.Option("--spares", help="Standby actors that take over a lost rank.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's logs.")]


def terminal_progress() -> Progress:
    """Bars on a terminal, plain lines elsewhere; always on standard error."""
    return ConsoleProgress()
