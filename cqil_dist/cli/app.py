"""Gathers the subcommands, and turns our errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from cqil_dist.cli import (
    bench,
    demo,
    distill,
    doctor,
    evaluate,
    generate,
    model,
    plan,
    serve,
    trace,
    verify,
)
from cqil_dist.errors import CqilError

# Ray reads these when it is imported; set later, they would contradict what Ray has read.
if "ray" not in sys.modules:
    # Ray turns token authentication on for the clusters it starts; its drivers have to ask for it.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Losses are made good and logged as recoveries. Ray would print them on standard output, in
    # the midst of the completion.
    os.environ.setdefault(
        "RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed|The node with node id"
    )


class _Group(typer.core.TyperGroup):
    """A command group that shows errors raised on purpose as one message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CqilError as error:
            typer.echo(f"error: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            sys.exit(130)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Low-latency distributed generation: layers of a language model run concurrently (CQIL).",
)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("trace")(trace.trace)
app.command("verify")(verify.verify)
app.command("eval")(evaluate.evaluate)
app.command("distill")(distill.distill)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.add_typer(plan.app, name="plan")
app.add_typer(model.app, name="model")
app.add_typer(bench.app, name="bench")
