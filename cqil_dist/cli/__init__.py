"""The `cqil` command: each subcommand in a module of its own."""

from __future__ import annotations

from cqil_dist.cli.app import app

__all__ = ["app"]
