"""A user's own model directory, which is used as it is or refused with the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cqil_dist.errors import CheckpointError
from cqil_dist.progress import SilentProgress
from cqil_dist.store import store

SILENT = SilentProgress()


@pytest.fixture
def directory(converted_cache: Path, tmp_path: Path) -> Path:
    (finished,) = (converted_cache / "models").iterdir()
    copy = tmp_path / "my model"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("manifest.json"))
    return copy


def test_complete_directory_is_used_in_place(directory: Path, cache: Path) -> None:
    assert store.resolve(str(directory), SILENT) == directory
    fetched = store.fetch(str(directory), SILENT)
    assert fetched.path == directory
    assert fetched.size_bytes == sum(file.stat().st_size for file in directory.iterdir())
    assert not cache.exists()


def test_sharded_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors, which"):
        store.resolve(str(directory), SILENT)
    (directory / "model-00002-of-00002.safetensors").touch()
    assert store.resolve(str(directory), SILENT) == directory
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="'weight_map'"):
        store.resolve(str(directory), SILENT)


def test_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        store.resolve(str(directory), SILENT)
    (directory / "tiny.gguf").touch()
    with pytest.raises(CheckpointError, match=r"it holds tiny\.gguf: name that file itself"):
        store.resolve(str(directory), SILENT)


def test_config_that_is_not_json(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        store.resolve(str(directory), SILENT)


def test_pickled_weights_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="convert once with: python -c"):
        store.resolve(str(directory), SILENT)


def test_no_weights_at_all(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        store.resolve(str(directory), SILENT)


def test_no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        store.resolve(str(directory), SILENT)
