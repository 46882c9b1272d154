"""The manifest of a model directory in the cache: what it was made from, and what is in it.

The manifest is a JSON file with the model's name, what the directory was made from and with, and
size and SHA-256 of every other file. This module knows nothing of how models are made or locked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cqil_dist.progress import Progress

MANIFEST_NAME = "manifest.json"
# The number is raised when directories that earlier releases made have to be made again.
_FORMAT = 1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """The manifest of a finished model directory.

    Attributes:
        name: the model's name, as the user gave it.
        source: exactly what the directory was made from.
        origin: further facts for the reader, such as the commit or the licence.
        files: "bytes" and "sha256" of every file, by file name.
    """

    name: str
    source: str
    origin: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def total_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(int(file["bytes"]) for file in self.files.values())


def read_manifest(path: Path) -> Manifest | None:
    """Read the manifest in a directory; None if there is none, or none of the present format."""
    try:
        decoded = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
        if decoded["format"] != _FORMAT:
            return None
        return Manifest(decoded["name"], decoded["source"], decoded["origin"], decoded["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_manifest(
    path: Path, name: str, source: str, origin: Mapping[str, str], progress: Progress
) -> None:
    """Write the manifest of a finished directory, reading every file for its checksum."""
    found = sorted(file for file in path.iterdir() if file.is_file())
    total = sum(file.stat().st_size for file in found)
    with progress.task(f"Computing checksums of {name}", total=total, unit="B") as task:
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file, task.advance)}
            for file in found
        }
    stated = {
        "format": _FORMAT,
        "name": name,
        "source": source,
        "origin": dict(origin),
        "versions": {
            package: _version(package)
            for package in ("cqil-dist", "transformers", "torch", "gguf", "huggingface_hub")
        },
        "files": files,
    }
    (path / MANIFEST_NAME).write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def damage(path: Path, source: str) -> str | None:
    """Say why a directory has to be made again; None if its source and file sizes are right."""
    manifest = read_manifest(path)
    if manifest is None:
        return "it is not complete"
    if manifest.source != source:
        return f"it was made from {manifest.source}, not {source}"
    for name, file in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != file["bytes"]:
            return f"{name} has {size} bytes instead of {file['bytes']}"
    return None


def changed_file(path: Path, name: str, progress: Progress) -> str | None:
    """Name a file whose content has changed, or return None after reading all of them."""
    manifest = read_manifest(path)
    assert manifest is not None
    with progress.task(f"Verifying {name}", total=manifest.total_bytes, unit="B") as task:
        for file_name, file in manifest.files.items():
            if sha256_of(path / file_name, task.advance) != file["sha256"]:
                return f"{file_name} has changed since it was written"
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # this package, run from its source tree
        return None


def sha256_of(path: Path, count: Callable[[int], None] | None = None) -> str:
    """Compute the hex SHA-256 of a file; `count` is called with the size of each chunk read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if count is not None:
                count(len(chunk))
    return digest.hexdigest()
