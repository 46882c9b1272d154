"""Files written whole or not at all, records as JSON among them."""

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
    """A file beside `path` to write; it takes that one's place if the block ends well.

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
    """A record that says what it is of."""
    return {"record": kind, "format": _FORMAT, **found}


def kind_of(record: object) -> tuple[str | None, bool]:
    """What a record is of, None if it is none; and whether it can be read."""
    if not isinstance(record, dict) or not isinstance(record.get("record"), str):
        return None, False
    return record["record"], record.get("format") == _FORMAT


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace a file, and make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def require_file(path: Path) -> None:
    """Better before hours of work than after: raises ConfigError where no file can be written."""
    if path.is_dir():
        raise ConfigError(
            f"--output {path} is a folder; name a file, such as {path / 'found.json'}"
        )
    require_folder(path.parent)


def require_folder(path: Path) -> None:
    """Make a folder to write to. Raises ConfigError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            """It can be written to."""
    except OSError as error:
        raise ConfigError(f"cannot write to the folder {path}: {error}") from error
