"""Writes files whole or not at all, JSON records among them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from cqil_dist.errors import ConfigError

# Of the records that a report is made from: it reads none of another.
_FORMAT = 2


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write to; it takes the place of `path` if the block ends well.

    Folders that are missing are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def headed(kind: str, **found: Any) -> dict[str, Any]:
    """Make a record that says of what kind it is."""
    return {"record": kind, "format": _FORMAT, **found}


def kind_of(record: object) -> tuple[str | None, bool]:
    """Tell the kind of a record (None if it is none), and whether this version can read it."""
    if not isinstance(record, dict) or not isinstance(record.get("record"), str):
        return None, False
    return record["record"], record.get("format") == _FORMAT


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record to a file in place of what is there; folders that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def require_file(path: Path) -> None:
    """Raise ConfigError if no file can be written here: better before hours of work than after."""
    if path.is_dir():
        raise ConfigError(
            f"--output {path} is a folder; name a file, such as {path / 'found.json'}"
        )
    require_folder(path.parent)


def require_folder(path: Path) -> None:
    """Make a folder to write to. Raises ConfigError if that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass  # it can be written to
    except OSError as error:
        raise ConfigError(f"cannot write to the folder {path}: {error}") from error
