"""A tiny model as a GGUF file, the cache that results from converting it, and a fresh cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.tiny_gguf import TinyGguf, write_tiny_gguf

from cqil_dist.progress import SilentProgress
from cqil_dist.store import gguf as conversion
from cqil_dist.store import store


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> TinyGguf:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return TinyGguf(path, write_tiny_gguf(path))


@pytest.fixture(scope="session")
def converted_cache(tiny_gguf: TinyGguf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the tiny model, really converted; no test may change it."""
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CQIL_CACHE", str(folder))
        store.resolve(str(tiny_gguf.path), SilentProgress())
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache for this test, empty and checked for leftovers afterwards."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CQIL_CACHE", str(folder))
    yield folder
    building = folder / "building"
    assert not building.exists() or os.listdir(building) == [], "work in progress was left behind"


@pytest.fixture
def filled_cache(cache: Path, converted_cache: Path) -> Path:
    """A cache for this test, with the tiny model in it."""
    shutil.copytree(converted_cache, cache)
    return cache


@pytest.fixture
def quick_conversion(converted_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were converted; conversion is replaced by a copy of its real result."""
    (finished,) = (converted_cache / "models").iterdir()
    converted: list[Path] = []

    def convert(gguf: Path, directory: Path, name: str, progress: object) -> None:
        work = directory.parent
        assert list(work.parent.iterdir()) == [work], "what a killed process left is still there"
        converted.append(gguf)
        shutil.copytree(finished, directory, ignore=shutil.ignore_patterns("manifest.json"))

    monkeypatch.setattr(conversion, "convert", convert)
    return converted
