"""What most tests of planning are made on: a random model of six layers."""

from __future__ import annotations

import pytest
from tiny_models import TinyModel, TinyModelFactory


@pytest.fixture(scope="module")
def tiny(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()
