"""The `cqil` command: each subcommand in a module of its own."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, which needs the package's extra `runtime`; a client goes without."""
    try:
        from cqil_dist.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("cqil_dist"):
            raise
        sys.exit(f"error: no module {error.name}: install cqil-dist[runtime] for the cqil command")
    app()
