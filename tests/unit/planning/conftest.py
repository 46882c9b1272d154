"""What most tests of planning are made on: a random model of six layers."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_models import TinyModel, TinyModelFactory


@pytest.fixture(scope="module")
def tiny(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is measured is kept in the test's own folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CQIL_CACHE", str(folder))
    return folder
