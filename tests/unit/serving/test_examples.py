"""Every example runs against a service, and prints what the service answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.observed_engine import PLAN, ObservedModel, serving
from helpers.served import MODEL, Served, served
from helpers.tiny_models import TinyModelFactory

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def service(tiny_model: TinyModelFactory) -> Iterator[Served]:
    model = tiny_model()
    steps = ObservedModel(model, model.plan(PLAN), 4)
    with serving(model, steps) as engine, served(engine) as service:
        yield service


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_each_example_is_tested() -> None:
    names = {"client.py", "asyncio_client.py", "openai_client.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == names


def test_client(service: Served) -> None:
    shown = run("client.py", "--address", service.addresses.grpc)
    with service.client() as client:
        text = client.generate("Once upon a time", max_tokens=32, temperature=0).text
    assert shown.startswith(f"{MODEL}: 6 groups, context 64\n{text}\n")
    assert "tokens)" in shown


def test_asyncio_client(service: Served) -> None:
    shown = run("asyncio_client.py", "--address", service.addresses.grpc)
    with service.client() as client:
        for prompt in ("The capital of France is", "A lighthouse is", "def fibonacci(n):"):
            assert prompt + client.generate(prompt, max_tokens=24, temperature=0).text in shown


def test_openai_client(service: Served) -> None:
    shown = run("openai_client.py", "--base-url", f"{service.addresses.http}/v1")
    with service.client() as client:
        message = {"role": "user", "content": "Name three rivers."}
        answer = client.chat([message], max_tokens=32, temperature=0).text
        text = client.generate(
            "Once upon a time",
            max_tokens=32,
            temperature=0.8,
            seed=1,
            min_p=0.05,
            repetition_penalty=1.1,
        ).text
    assert shown == f"{answer}\n{text}\n"
