"""The client over real connections: a service that has moved is found again by every stream."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.observed_engine import PLAN, ObservedModel, serving
from helpers.served import coordinated
from helpers.tiny_models import TinyModelFactory

from cqil_dist.client import Client
from cqil_dist.errors import ConfigError


def test_streams_that_wait_for_another_to_find_the_service_go_on(
    tiny_model: TinyModelFactory,
) -> None:
    """Finding it takes longer than their patience with a service that nobody finds."""
    model = tiny_model()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # nobody listens here
        gone = f"127.0.0.1:{sock.getsockname()[1]}"
        with (
            serving(model, ObservedModel(model, model.plan(PLAN), 4)) as engine,
            coordinated(engine) as (address, key),
        ):

            def locate() -> str:
                time.sleep(1.5)
                return address

            def complete() -> tuple[int, ...]:
                return client.generate("x", max_tokens=5, temperature=0).token_ids

            with (
                Client(gone, api_key=key, locate=locate, patience_s=1.0) as client,
                ThreadPoolExecutor(3) as pool,
            ):
                asked = [pool.submit(complete) for _ in range(3)]
                answers = {future.result(timeout=30) for future in asked}
    assert [len(answer) for answer in answers] == [5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ca_cert": Path("ca.pem")}, "tls is off, which would send everything in the clear"),
        ({"api_key": "secret\n"}, "without a line's end"),
        ({"api_key": "gehe\u00efm"}, "printable ASCII"),
    ],
)
def test_what_would_give_the_key_away_or_not_arrive_is_refused(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Client("localhost:1", **given)
    assert "secret" not in str(caught.value)
