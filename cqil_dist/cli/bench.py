"""`cqil bench`: latency measurements."""

from __future__ import annotations

import typer

from cqil_dist.benchmarks.latency import command as latency

app = typer.Typer(no_args_is_help=True, help="Measure latency.")


@app.callback()
def _bench() -> None:
    """Keeps `latency` a subcommand while it is the only one."""


app.command("latency")(latency)
