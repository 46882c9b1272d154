"""Fixtures that tests of every kind share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.tiny_models import TinyModelFactory
from hypothesis import settings

# Models here are tiny: several threads of torch in every process only take each other's time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from cqil_dist.progress import SilentProgress
from cqil_dist.store.store import resolve

torch.set_num_threads(1)

# How long an example takes is the machine's affair: one stall must not fail a property.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Directory of the built-in trained model. Tests that use it are marked `real_model`."""
    return resolve("smollm2-135m", SilentProgress())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModelFactory:
    """Makes tiny random models, each once a session. Tests leave their files as they are."""
    return TinyModelFactory(tmp_path_factory.mktemp("tiny_models"))
