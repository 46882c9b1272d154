"""A service over a tiny engine, whose HTTP port each test must leave as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from helpers.raw_http import MAX_BODY, ask, completion
from helpers.served import Served, served
from helpers.watching import wait_for

from cqil_dist.engine.engine import Engine


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[Served]:
    with served(engine, max_body_bytes=MAX_BODY) as service:
        yield service
        wait_for(lambda: service.idle, "no request is left")


@pytest.fixture(autouse=True)
def nothing_unexpected(service: Served, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Check after each test that a good request is answered, and that no error was logged."""
    yield
    assert ask(service, completion())[0] == 200
    logged = caplog.get_records("call")
    errors = [record for record in logged if record.levelno >= logging.ERROR]
    assert not errors, errors[0].getMessage()
