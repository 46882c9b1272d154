"""Keys, bounds, losses and callers that leave, through the `openai` package."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from helpers.observed_engine import (
    PLAN,
    LostInStep,
    ObservedModel,
    serving,
)
from helpers.openai_calls import (
    MESSAGES,
    TEXT,
    arguments,
    chat,
    complete,
    openai_of,
    stream,
    text_of,
)
from helpers.served import MODEL, PacedModel, Served, served
from helpers.tiny_models import TinyModel
from helpers.watching import wait_for
from openai import AsyncOpenAI, OpenAI

from cqil_dist.engine.engine import Engine, StepModel
from cqil_dist.errors import ExchangeError


def test_a_key_is_asked_for_under_v1(engine: Engine) -> None:
    with served(engine, api_key="open sesame") as service:
        with openai_of(service, api_key="open sesame") as client:
            assert [model.id for model in client.models.list()] == [MODEL]
            assert complete(client, TEXT).choices
        with openai_of(service, api_key="open sesamf") as client:
            for call in (lambda: complete(client, TEXT), lambda: client.models.list()):
                with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
                    call()
        with httpx.Client(base_url=service.addresses.http) as plain:
            assert plain.get("/health").status_code == 200
            for path in (
                "/v1/models",
                "/v1/models/tiny",
                "/status",
                "/v1/nowhere",
                "/%76%31/models",
            ):
                refused = plain.get(path)
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == "Bearer"
                assert refused.json()["error"]["type"] == "authentication_error"
            for header in ("open sesame", "Basic open sesame", "bearer", "Bearer öpen sesame"):
                headers = [(b"authorization", header.encode())]
                assert plain.get("/v1/models", headers=headers).status_code == 401


def test_a_path_or_a_method_that_is_not_there_is_said(service: Served) -> None:
    with httpx.Client(base_url=service.addresses.http) as plain:
        missing = plain.post("/v1/embeddings", json={})
        assert missing.status_code == 404
        assert missing.json()["error"] == {
            "message": "/v1/embeddings: Not Found",
            "type": "not_found_error",
            "param": None,
            "code": 404,
        }
        wrong = plain.get("/v1/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["error"]["message"] == "/v1/completions: Method Not Allowed"


def test_a_body_that_is_too_large_is_refused(engine: Engine) -> None:
    with served(engine, max_body_bytes=5000) as service, openai_of(service) as client:
        with pytest.raises(openai.APIStatusError, match="larger than 5000 bytes") as caught:
            complete(client, "x" * 5000)
        assert caught.value.status_code == 413
        assert complete(client, TEXT).choices


def unfinished(service: Served) -> tuple[int, int]:
    """The number of requests that run, and of those that wait."""
    status = service.engine.status()
    return status.running_requests, status.waiting_requests


def test_beyond_the_queue_requests_are_told_to_come_back(slow: Served, paced: PacedModel) -> None:
    """The others are answered all the same, and the package tries again by itself."""
    with openai_of(slow) as client, ThreadPoolExecutor(4) as pool:
        with paced.held():
            asked = [
                pool.submit(complete, client, TEXT, max_tokens=20, temperature=0) for _ in range(3)
            ]
            wait_for(lambda: sum(unfinished(slow)) == 3, "a full queue")
            for call in (complete, stream):
                with pytest.raises(openai.RateLimitError, match="all 2 slots are taken") as caught:
                    call(client, TEXT)
                assert int(caught.value.response.headers["retry-after"]) >= 1
                assert caught.value.type == "rate_limit_error"
            patient = pool.submit(
                complete, client.with_options(max_retries=9), TEXT, max_tokens=20, temperature=0
            )
        answers = {future.result(30).choices[0].text for future in [*asked, patient]}
    assert len(answers) == 1


def test_more_choices_than_can_ever_be_let_in_are_a_mistake(slow: Served) -> None:
    """Unlike with a full queue, it would be useless to try again."""
    with openai_of(slow) as client:
        with pytest.raises(openai.BadRequestError, match="4 choices are more than the 3 requests"):
            complete(client, TEXT, n=4)
        assert len(complete(client, TEXT, n=3, max_tokens=2).choices) == 3


def test_a_service_that_drains_finishes_what_runs_and_sends_others_away(
    slow: Served, paced: PacedModel
) -> None:
    with openai_of(slow) as client, ThreadPoolExecutor(2) as pool:
        with paced.held():
            running = pool.submit(stream, client, TEXT, max_tokens=10)
            wait_for(lambda: unfinished(slow) == (1, 0), "it runs")
            draining = pool.submit(lambda: slow.run(slow.service.drain()))
            wait_for(lambda: health(slow) == 503, "it drains")
            for call in (complete, stream, chat):
                with pytest.raises(openai.InternalServerError, match="is ending") as caught:
                    call(client, MESSAGES if call is chat else TEXT)
                assert caught.value.status_code == 503
                assert int(caught.value.response.headers["retry-after"]) >= 1
        events = running.result(30)
        draining.result(30)
    assert len(events) == 10
    assert events[-1].choices[0].finish_reason == "length"


def health(service: Served) -> int:
    return httpx.get(f"{service.addresses.http}/health").status_code


def test_a_request_that_takes_too_long_ends_and_frees_its_slot(
    model: TinyModel, paced: PacedModel
) -> None:
    """The error is a status before the answer has begun, and an event of the stream after."""
    paced.pace_s = 0.05  # 50 tokens take longer than the timeout, and the first far less
    with (
        serving(model, paced, slots=2) as engine,
        served(engine, request_timeout_s=1.5) as service,
        openai_of(service) as client,
    ):
        with paced.held():
            for call in (complete, stream):
                with pytest.raises(
                    openai.InternalServerError, match=r"deadline has passed|not done within"
                ) as caught:
                    call(client, TEXT)
                assert caught.value.status_code == 504
                assert caught.value.type == "timeout_error"
        wait_for(lambda: service.idle, "its slot is free")
        events = client.completions.create(
            prompt=TEXT, stream=True, **arguments({"max_tokens": 50})
        )
        assert next(events).choices
        with pytest.raises(openai.APIError) as in_stream:
            list(events)
        assert "timeout_error" in str(in_stream.value.body)
        assert complete(client, TEXT, max_tokens=2).choices


# What happens below.


def test_a_loss_in_the_middle_of_a_stream_does_not_show(client: OpenAI, model: TinyModel) -> None:
    """After a pause, new ranks give the tokens that the stream would have had."""

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        return ObservedModel(model, model.plan(PLAN), 4), {}

    asked = {"seed": 5, "max_tokens": 30, "logprobs": 1}
    expected = text_of(stream(client, TEXT, **asked))
    with (
        serving(model, LostInStep(model, 20), rebuild) as engine,
        served(engine) as service,
        openai_of(service) as own,
    ):
        assert text_of(stream(own, TEXT, **asked)) == expected
        assert engine.status().recoveries == 1


def test_an_engine_that_gave_up_is_said(model: TinyModel) -> None:
    """The error is a status or in the stream, and the health check asks for no more requests."""
    with (
        serving(model, LostInStep(model, 20)) as engine,
        served(engine) as service,
        openai_of(service) as client,
    ):
        with pytest.raises(openai.APIError, match="lost rank 1") as in_stream:
            stream(client, TEXT, max_tokens=30)
        assert "server_error" in str(in_stream.value.body)
        for call in (complete, stream):
            with pytest.raises(openai.InternalServerError, match="lost rank 1") as caught:
                call(client, TEXT)
            assert caught.value.status_code == 500
        wait_for(lambda: health(service) == 503, "health says so")
        told = httpx.get(f"{service.addresses.http}/health").json()["error"]["message"]
        assert "lost rank 1" in told


# Callers that go.


def test_a_stream_that_is_closed_midway_frees_its_slots(slow: Served, paced: PacedModel) -> None:
    with openai_of(slow) as client:
        for options in ({}, {"n": 2}, {"n": 3}):  # the last one's third choice waits for a slot
            before = len(paced.steps)
            asked = arguments({"max_tokens": 50, **options})
            with client.completions.create(prompt=TEXT, stream=True, **asked) as events:
                next(iter(events))
            wait_for(lambda: slow.idle, "its slots are free")
            assert len(paced.steps) < before + 50
        answer: Any = client.chat.completions.create(
            messages=MESSAGES, stream=True, **arguments({})
        )
        with answer:
            next(iter(answer))
        wait_for(lambda: slow.idle, "its slots are free")


def test_a_call_that_is_cancelled_frees_its_slot(slow: Served, paced: PacedModel) -> None:
    """The call may run or wait for a slot; those beside it stay."""
    paced.pace_s = 0.2  # none of them ends by itself before the last has been cancelled

    async def calls() -> None:
        async with AsyncOpenAI(
            base_url=f"{slow.addresses.http}/v1", api_key="unasked", max_retries=0
        ) as client:

            def call(**options: Any) -> asyncio.Task[Any]:
                asked = arguments({"max_tokens": 50, **options})
                return asyncio.create_task(client.completions.create(prompt=TEXT, **asked))

            async def until(counts: tuple[int, int]) -> None:
                while unfinished(slow) != counts:
                    await asyncio.sleep(0.01)

            running = call()
            await until((1, 0))
            before = len(paced.steps)
            beside = call(stream=True)
            await until((2, 0))
            waiting = call()
            await until((2, 1))
            waiting.cancel()
            await until((2, 0))
            running.cancel()
            await until((1, 0))
            paced.pace_s = 0
            async for event in await beside:
                last = event
            assert last.choices[0].finish_reason == "length"
            assert len(paced.steps) < before + 80
            for task in (running, waiting):
                with pytest.raises(asyncio.CancelledError):
                    await task

    asyncio.run(asyncio.wait_for(calls(), 30))
    wait_for(lambda: slow.idle, "their slots are free")


def test_a_caller_that_gives_up_frees_its_slot(slow: Served, paced: PacedModel) -> None:
    """The caller's timeout closes the connection before anything has been answered."""
    with openai_of(slow, timeout=0.3) as client, paced.held():
        for call in (complete, stream):
            with pytest.raises(openai.APITimeoutError):
                call(client, TEXT, max_tokens=50)
        wait_for(lambda: not slow.service.requests, "they have left")
    wait_for(lambda: slow.idle, "their slots are free")


def test_many_come_and_go_together(slow: Served) -> None:
    """Callers get an answer, find a full queue, or leave."""
    outcomes: list[str] = []

    def one(number: int) -> None:
        with openai_of(slow, timeout=10) as client:
            try:
                with client.completions.create(
                    prompt=TEXT, stream=True, **arguments({"max_tokens": 12, "seed": number})
                ) as events:
                    for place, _ in enumerate(events):
                        if place == number % 14:
                            break
                outcomes.append("answered")
            except openai.RateLimitError:
                outcomes.append("refused")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 16
    assert "answered" in outcomes
    wait_for(lambda: slow.idle, "all slots are free")
