"""What a finished model directory in the cache states about itself, and whether that still holds.

The manifest is a JSON file in the directory: what the model is, what it was made from and with,
and size and SHA-256 of every other file. Knows nothing of how models are made or locked.
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
# Raised when directories made by earlier releases have to be made again.
_FORMAT = 1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """What a finished directory states about itself.

    Attributes:
        name: what the user calls the model.
        source: what it is made from, exactly.
        origin: further facts for the reader, such as the commit or the licence.
        files: "bytes" and "sha256" of every file, by name.
    """

    name: str
    source: str
    origin: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def bytes(self) -> int:
        return sum(int(file["bytes"]) for file in self.files.values())


def read_manifest(path: Path) -> Manifest | None:
    """What the directory states about itself; None where there is nothing readable."""
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
    """State all that is in the finished directory at `path`; reads every file for its checksum."""
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
    """Why the directory cannot be used as it is; None where its files all have their size."""
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
    """Which file's content is not what the manifest states, read in full; None where none."""
    manifest = read_manifest(path)
    assert manifest is not None
    with progress.task(f"Verifying {name}", total=manifest.bytes, unit="B") as task:
        for file_name, file in manifest.files.items():
            if sha256_of(path / file_name, task.advance) != file["sha256"]:
                return f"{file_name} has changed since it was written"
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # ours, run from its source tree
        return None


def sha256_of(path: Path, count: Callable[[int], None] | None = None) -> str:
    """Hex checksum of a file's content; `count` is told of each chunk's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if count is not None:
                count(len(chunk))
    return digest.hexdigest()
