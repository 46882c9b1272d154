"""One finished model directory in the cache: built whole or not at all.

Knows the cache's layout and locks; knows nothing of where models come from. Under the
cache directory:

    models/<key>/          a finished entry: the model directory's files and the manifest
    building/<key>/<tmp>/  work in progress, renamed into models/ when complete
    locks/<key>.lock       held by the process that builds or repairs the entry

A process that is killed leaves only a folder under building/, which the next build removes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cqil_dist.errors import ModelError
from cqil_dist.progress import Progress, format_bytes
from cqil_dist.store.manifest import (
    MANIFEST_NAME,
    Manifest,
    changed_file,
    damage,
    read_manifest,
    write_manifest,
)


def cache_dir() -> Path:
    """$CQIL_CACHE, else $XDG_CACHE_HOME/cqil_dist, else ~/.cache/cqil_dist."""
    if chosen := os.environ.get("CQIL_CACHE"):
        return Path(chosen).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "cqil_dist"
    return Path.home() / ".cache" / "cqil_dist"


@dataclass(frozen=True)
class Build:
    """What a recipe is given to work with.

    Attributes:
        folder: scratch space, removed afterwards.
        directory: where the model directory has to be when the recipe returns; in `folder`, and
            not there yet.
        damaged: a finished entry was there, and something in it was missing or changed.
        progress: where to say how far it is.
    """

    folder: Path
    directory: Path
    damaged: bool
    progress: Progress


@dataclass(frozen=True)
class Recipe:
    """How one entry is made.

    Attributes:
        key: the entry's folder name.
        name: what the user calls the model.
        source: what it is made from, exactly: an entry that states another is made again.
        make: makes the model directory, and returns what else the manifest should record.
    """

    key: str
    name: str
    source: str
    make: Callable[[Build], Mapping[str, str]]


def entry_path(key: str) -> Path:
    """Where the finished entry `key` is, or would be."""
    return cache_dir() / "models" / key


def ensure(recipe: Recipe, progress: Progress, *, checksums: bool = False) -> Path:
    """The finished entry of `recipe`, made now if it is not there or not intact.

    Args:
        recipe: how to make it.
        progress: where to say how far it is.
        checksums: read every file and compare checksums; otherwise only sizes, which takes
            a millisecond and no lock.

    Raises:
        ModelError: it cannot be made, for the recipe's reasons.
        OSError: the cache cannot be written.
    """
    path = entry_path(recipe.key)
    if not checksums and damage(path, recipe.source) is None:
        return path
    with _lock(recipe, progress):
        reason = damage(path, recipe.source)
        if reason is None and checksums:
            reason = changed_file(path, recipe.name, progress)
        if reason is not None:
            _build(recipe, path, reason, progress)
    return path


def finished() -> Iterator[tuple[Path, Manifest]]:
    """Every finished entry in the cache, in the order of their keys."""
    for path in sorted((cache_dir() / "models").glob(f"*/{MANIFEST_NAME}")):
        if (manifest := read_manifest(path.parent)) is not None:
            yield path.parent, manifest


def require_space(needed: int, name: str, place: Path | None = None) -> None:
    """Raise ModelError where the disk of `place` (the cache) has less than `needed` bytes free."""
    place = place or cache_dir()
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ModelError(
            f"{name} needs {format_bytes(needed)} on the disk of {place} while it is fetched and "
            f"converted, but {format_bytes(free)} is free; free some, or choose another place with "
            "CQIL_CACHE (HF_HOME for what comes from the hub)"
        )


def _build(recipe: Recipe, path: Path, reason: str, progress: Progress) -> None:
    building = cache_dir() / "building"
    _remove_leftovers(building, recipe.key)
    ours = building / recipe.key
    ours.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=ours))
    directory = folder / "model"
    try:
        damaged = path.exists()
        if damaged:
            progress.note(f"Making {recipe.name} again: {reason}")
        origin = recipe.make(Build(folder, directory, damaged, progress))
        write_manifest(directory, recipe.name, recipe.source, origin, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        if damaged:  # a directory cannot be renamed over one that holds files
            path.rename(folder / "replaced")
        directory.rename(path)
    finally:
        shutil.rmtree(ours, ignore_errors=True)


@contextmanager
def _lock(recipe: Recipe, progress: Progress) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(_lock_path(recipe.key))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with progress.task(f"Waiting for another process that is preparing {recipe.name}"):
            lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _lock_path(key: str) -> Path:
    path = cache_dir() / "locks" / f"{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _remove_leftovers(building: Path, key: str) -> None:
    """Remove what killed processes left: ours, whose lock we hold, and all that nobody locks."""
    from filelock import FileLock, Timeout

    shutil.rmtree(building / key, ignore_errors=True)
    for folder in building.glob("*"):
        try:
            with FileLock(_lock_path(folder.name)).acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except Timeout:  # somebody is building it
            continue
