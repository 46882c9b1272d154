"""A service over a tiny engine, and the `openai` package's client of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.observed_engine import (
    PLAN,
    ObservedModel,
    serving,
)
from helpers.openai_calls import ORIGINAL, PACE_S, openai_of
from helpers.served import MODEL, PacedModel, Served, served
from helpers.tiny_models import TinyModel, TinyModelFactory
from helpers.watching import wait_for
from openai import OpenAI

from cqil_dist.engine.engine import Engine


@pytest.fixture(scope="module")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


@pytest.fixture(scope="module")
def engine(model: TinyModel) -> Iterator[Engine]:
    steps = ObservedModel(model, model.plan(PLAN), 4, compare=model.plan("sequential"))
    with serving(model, steps) as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[Served]:
    with served(engine, [MODEL, ORIGINAL]) as service:
        yield service
        wait_for(lambda: service.idle, "no request is left")


@pytest.fixture(scope="module")
def client(service: Served) -> Iterator[OpenAI]:
    with openai_of(service) as client:
        yield client


@pytest.fixture
def paced(model: TinyModel) -> PacedModel:
    return PacedModel(model, 2, PACE_S)


@pytest.fixture
def slow(model: TinyModel, paced: PacedModel) -> Iterator[Served]:
    """A service with two slots and room for one more to wait, in which everything takes a while."""
    with (
        serving(model, paced, slots=2, max_waiting=1) as engine,
        served(engine, drain_timeout_s=20) as service,
    ):
        yield service
        wait_for(lambda: service.idle, "no request is left")
