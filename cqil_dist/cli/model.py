"""`cqil model`: fetch models and list those at hand."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cqil_dist.progress import ConsoleProgress
from cqil_dist.store.store import fetch as fetch_model
from cqil_dist.store.store import list_models

app = typer.Typer(no_args_is_help=True, help="Fetch and list models.")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Built-in name, hub id, directory or GGUF file.")],
) -> None:
    """Fetch a model into the cache, or check the copy that is there and mend it.

    A hub id without a revision stays at the commit it was first fetched at.
    """
    stored = fetch_model(name, ConsoleProgress())
    typer.echo(f"{stored.name}: {stored.path} ({stored.size_bytes / 1e6:.1f} MB)")


@app.command("list")
def list_command() -> None:
    """Models in the cache, and those that can be fetched by name."""
    table = Table("name", "size", "source", "path")
    for stored in list_models():
        size = f"{stored.size_bytes / 1e6:.1f} MB" if stored.size_bytes else "not fetched"
        table.add_row(stored.name, size, stored.source, str(stored.path))
    Console().print(table)
