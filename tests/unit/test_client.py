"""The client over real connections: a service that has moved is found again by every stream."""

from __future__ import annotations

import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from observed_engine import PLAN, ObservedModel, greedy, serving
from tiny_models import TinyModelFactory

from cqil_dist.client import GenerationClient
from cqil_dist.exchange.handshake import SECRET_BYTES
from cqil_dist.serving.grpc_server import GenerationServicer, start_server


def test_streams_that_wait_for_another_to_find_the_service_go_on(
    tiny_model: TinyModelFactory,
) -> None:
    """Finding it takes longer than their patience with a service that nobody finds."""
    model = tiny_model()
    secret = secrets.token_bytes(SECRET_BYTES)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # nobody listens here
        gone = f"127.0.0.1:{sock.getsockname()[1]}"
        with serving(model, ObservedModel(model, model.plan(PLAN), 4)) as engine:
            servicer = GenerationServicer(engine, status=lambda: None)  # type: ignore[arg-type,return-value]
            server, address = start_server(servicer, "127.0.0.1", secret, 8)

            def locate() -> str:
                time.sleep(1.5)
                return address

            try:
                with (
                    GenerationClient(gone, secret, locate, patience_s=1.0) as client,
                    ThreadPoolExecutor(3) as pool,
                ):
                    asked = [pool.submit(client.complete, "x", greedy(5)) for _ in range(3)]
                    answers = {future.result(timeout=30).token_ids for future in asked}
            finally:
                server.stop(grace=None).wait()
    assert [len(answer) for answer in answers] == [5]
