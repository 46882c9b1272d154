"""Model directories made from repositories on the Hugging Face hub.

This module knows which of a repository's files a model directory needs. huggingface_hub fetches
them into that library's own cache, where an interrupted download resumes and other programs find
the files too; the model directory holds links into it. Manifests and locks are not known here.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cqil_dist.errors import CheckpointError, ModelError, ModelNotFound
from cqil_dist.progress import following_growth
from cqil_dist.store.cache_entry import Build, require_space
from cqil_dist.store.directory import check_directory

_CONNECT_TIMEOUT_S = 8.0
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_OTHER_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def download(repo: str, revision: str, build: Build) -> str:
    """Make `build.directory` from a repository on the hub, and return the commit it is made from.

    Args:
        repo: the repository as "org/name".
        revision: a branch, a tag or a commit.
        build: where the directory is made; if a finished entry was damaged, all files are fetched
            again, because the damage may be in the hub's cache.

    Raises:
        ModelNotFound: there is no such repository or revision, no permission to read it, or no
            answer from the hub within seconds and no copy in its cache.
        CheckpointError: the repository holds no safetensors.
        ModelError: the download broke off, or there is not enough space for it.
    """
    try:
        snapshot = _fetch(repo, revision, build)
    except _Unreachable as unreachable:
        # The damaged file may be the very one in the hub's cache.
        found = None if build.damaged else _copy_in_hub_cache(repo, revision)
        if found is None:
            raise ModelNotFound(
                f"{repo!r} is not a directory or file here, so the hub was asked for it at "
                f"revision {revision!r}, without success: {unreachable}\nCheck the name and the "
                "network; for a private or gated model log in with 'hf auth login'; without a "
                "network, name a local model directory, a GGUF file, or a built-in model"
            ) from unreachable
        snapshot = found
    build.directory.mkdir()
    for name in _wanted(path.name for path in snapshot.iterdir()):
        (build.directory / name).symlink_to((snapshot / name).resolve())
    return snapshot.name


class _Unreachable(Exception):
    """The hub gave no usable answer about a repository."""


def _fetch(repo: str, revision: str, build: Build) -> Path:
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        info = huggingface_hub.HfApi().model_info(
            repo, revision=revision, timeout=_CONNECT_TIMEOUT_S, files_metadata=True
        )
    except Exception as error:  # errors of the HTTP library, which differ between hub releases
        raise _Unreachable(" ".join(str(error).split()) or type(error).__name__) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = _wanted(sizes)
    if not any(name.endswith(".safetensors") for name in wanted):
        raise CheckpointError(
            f"{repo}@{revision} holds no *.safetensors weights, and nothing else is read from the "
            "hub; name a repository that has them, or a GGUF file on this machine"
        )

    def is_cached(name: str) -> bool:
        found = huggingface_hub.try_to_load_from_cache(repo, name, revision=info.sha)
        return isinstance(found, str)

    needed = sum(sizes[name] for name in wanted if build.damaged or not is_cached(name))
    folder = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    folder.mkdir(parents=True, exist_ok=True)
    require_space(needed, repo, folder)
    with (
        build.progress.task(f"Downloading {repo}@{revision}", needed, "B") as task,
        _quiet_hub(),
    ):
        try:
            with following_growth(folder, task):
                snapshot = huggingface_hub.snapshot_download(
                    repo, revision=revision, allow_patterns=wanted, force_download=build.damaged
                )
        except Exception as error:  # as above
            raise ModelError(
                f"the download of {repo}@{revision} broke off: {error}; run it again, and it goes "
                "on where it stopped"
            ) from error
        task.update(needed)
    return Path(snapshot)


def _copy_in_hub_cache(repo: str, revision: str) -> Path | None:
    import huggingface_hub

    try:
        # If all files were asked for, the library would miss those that were never downloaded.
        snapshot = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns="config.json", local_files_only=True
            )
        )
        check_directory(snapshot)
    except Exception:  # the library's errors differ between releases too
        return None
    return snapshot


def _wanted(names: Iterable[str]) -> list[str]:
    """Pick from these names the files that belong in a model directory.

    Repositories may also hold the weights in other formats or precisions, often in folders. Files
    with the standard names of weights are preferred to any other safetensors.
    """
    top = sorted(name for name in names if "/" not in name)
    weights = [name for name in top if _WEIGHTS.fullmatch(name)]
    weights = weights or [name for name in top if name.endswith(".safetensors")]
    return weights + [
        name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in _OTHER_FILES)
    ]


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the library's own progress bars and advice for the length of the block."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    logger = logging.getLogger("huggingface_hub")
    level, disabled = logger.level, are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not disabled:
            enable_progress_bars()
