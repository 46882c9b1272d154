"""A random model of six layers, and a cache of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_models import TinyModel, TinyModelFactory


@pytest.fixture(scope="module")
def tiny(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep measurements in a folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CQIL_CACHE", str(folder))
    return folder
