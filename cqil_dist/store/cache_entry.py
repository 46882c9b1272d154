"""The cache of model directories, whose entries are made whole or not at all.

    models/<key>/          a finished entry: the model directory's files and the manifest
    building/<key>/<tmp>/  an entry in the making, renamed into models/ when it is complete
    locks/<key>.lock       a lock held by the process that makes or repairs the entry

A process that is killed leaves only a folder under building/, which the next build removes. This
module knows the cache's layout and locks; it knows nothing of where models come from.
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
    """Locate the cache: $CQIL_CACHE, else $XDG_CACHE_HOME/cqil_dist, else ~/.cache/cqil_dist."""
    if chosen := os.environ.get("CQIL_CACHE"):
        return Path(chosen).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "cqil_dist"
    return Path.home() / ".cache" / "cqil_dist"


@dataclass(frozen=True)
class Build:
    """The folders and facts that `Recipe.make` is given to work with.

    Attributes:
        folder: a folder for scratch files, removed afterwards.
        directory: path inside `folder`, where `make` has to put the model directory.
        damaged: whether there is a finished entry, in which something is missing or has changed.
        progress: where progress is reported.
    """

    folder: Path
    directory: Path
    damaged: bool
    progress: Progress


@dataclass(frozen=True)
class Recipe:
    """The way to make one entry of the cache.

    Attributes:
        key: name of the entry's folder.
        name: the model's name, as the user gave it.
        source: exactly what the entry is made from; an entry with another source is made again.
        make: makes the model directory, and returns further facts for the manifest to record.
    """

    key: str
    name: str
    source: str
    make: Callable[[Build], Mapping[str, str]]


def entry_path(key: str) -> Path:
    """Return the path of the entry `key`, whether it exists or not."""
    return cache_dir() / "models" / key


def ensure(recipe: Recipe, progress: Progress, *, checksums: bool = False) -> Path:
    """Return the path of the finished entry of `recipe`; make it first if it is missing or damaged.

    Args:
        recipe: how to make the entry.
        progress: where progress is reported.
        checksums: whether to read every file and compare checksums; otherwise sizes alone are
            compared, which takes a millisecond and no lock.

    Raises:
        ModelError: the recipe failed.
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
    """Yield the path and manifest of every finished entry in the cache, ordered by keys."""
    for path in sorted((cache_dir() / "models").glob(f"*/{MANIFEST_NAME}")):
        if (manifest := read_manifest(path.parent)) is not None:
            yield path.parent, manifest


def require_space(needed: int, name: str, place: Path | None = None) -> None:
    """Raise ModelError if less than `needed` bytes are free on the disk of `place` or the cache."""
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
        if damaged:  # a directory cannot be renamed to the path of one that holds files
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
    """Remove what killed processes left under building/, except for entries that are locked.

    The caller holds the lock of `key`, so that its leftovers are removed in any case.
    """
    from filelock import FileLock, Timeout

    shutil.rmtree(building / key, ignore_errors=True)
    for folder in building.glob("*"):
        try:
            with FileLock(_lock_path(folder.name)).acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except Timeout:  # another process is making this entry
            continue
