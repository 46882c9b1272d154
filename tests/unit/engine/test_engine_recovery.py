"""A model that is lost and replaced: requests go on as if nothing had been."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from helpers.observed_engine import (
    LOST,
    MAX_LEN,
    PLAN,
    PROMPTS,
    LostInStep,
    ObservedModel,
    ask,
    finish,
    greedy,
    read,
    serving,
)
from helpers.tiny_models import VOCAB, TinyModel, TinyModelFactory, random_tokens

from cqil_dist.engine.engine import Engine, StepModel
from cqil_dist.errors import CqilError, ExchangeError, PeerLost, RankUnavailable, RequestError
from cqil_dist.outputs import Completion
from cqil_dist.sampling_params import SamplingParams
from cqil_dist.status import Recovery

REQUESTS = (
    (PROMPTS[0], greedy(20)),
    (PROMPTS[1], SamplingParams(max_tokens=25, temperature=0.9, seed=3, logprobs=2)),
    (PROMPTS[2], greedy(25, repetition_penalty=1.3)),
    (PROMPTS[3], SamplingParams(max_tokens=15, temperature=1.2, top_p=0.8, seed=4)),
)


class LostWhenIdle(ObservedModel):
    def check(self) -> None:
        raise LOST


@pytest.fixture
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


def healthy(model: TinyModel) -> ObservedModel:
    return ObservedModel(model, model.plan(PLAN), 4)


def run(engine: Engine, steps: ObservedModel) -> list[Completion]:
    with steps.held():
        requests = [engine.submit(ask(prompt, params)) for prompt, params in REQUESTS]
    return [finish(request) for request in requests]


def outcomes(completions: Sequence[Completion]) -> list[tuple[Any, ...]]:
    return [
        (c.text, c.token_ids, c.finish_reason, c.usage, [e.token_id for e in c.logprobs or ()])
        for c in completions
    ]


@pytest.fixture
def undisturbed(model: TinyModel) -> list[tuple[Any, ...]]:
    steps = healthy(model)
    with serving(model, steps) as engine:
        return outcomes(run(engine, steps))


@pytest.mark.parametrize("sent", [True, False], ids=["when_sent", "when_due"])
@pytest.mark.parametrize("number", [1, 2, 6, 17])
def test_requests_get_the_tokens_they_would_have_got(
    number: int, sent: bool, model: TinyModel, undisturbed: list[tuple[Any, ...]]
) -> None:
    """The loss falls into prefill, into decoding, or beside both; chunks and the whole agree."""
    recoveries: list[Recovery] = []
    steps = LostInStep(model, number, sent)

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        assert error is LOST
        return healthy(model), {"seat": 0.25, "load": 0.5}

    with serving(model, steps, rebuild, on_recovery=recoveries.append) as engine:
        assert outcomes(run(engine, steps)) == undisturbed
        status = engine.status()
    assert (status.state, status.recoveries) == ("serving", 1)
    assert recoveries == [status.last_recovery]
    assert "lost rank 1 at 10.0.0.2:4711" in recoveries[0].cause
    assert list(recoveries[0].phases) == ["seat", "load", "prefill"]


def test_losses_can_follow_each_other(model: TinyModel, undisturbed: list[tuple[Any, ...]]) -> None:
    """Each model computes a few steps; some not even one."""
    steps = LostInStep(model, 3)
    lives = iter([LostInStep(model, 0), LostInStep(model, 4), LostInStep(model, 2)])

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        return next(lives, healthy(model)), {}

    with serving(model, steps, rebuild) as engine:
        assert outcomes(run(engine, steps)) == undisturbed
        assert engine.status().recoveries == 3  # one took two attempts


def test_a_loss_between_requests_is_noticed_and_made_good(model: TinyModel) -> None:
    rebuilt = threading.Event()

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        rebuilt.set()
        return healthy(model), {}

    with serving(model, LostWhenIdle(model, model.plan(PLAN), 4), rebuild) as engine:
        assert rebuilt.wait(timeout=10)
        while engine.status().state != "serving":
            rebuilt.wait(0.01)
        assert engine.status().recoveries == 1


def test_what_is_known_is_told_before_the_wait_and_others_may_join_it(model: TinyModel) -> None:
    go_on = threading.Event()

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        assert go_on.wait(timeout=30)
        return healthy(model), {}

    with serving(model, LostInStep(model, 3), rebuild) as engine:
        first = engine.submit(ask(PROMPTS[0], greedy(10)))
        stream = iter(first.stream)
        seen = [next(stream) for _ in range(3)]  # steps 0 to 2 gave a token each
        while engine.status().state != "recovering":
            go_on.wait(0.01)
        assert "rank 1" in engine.status().state_detail
        second = engine.submit(ask(PROMPTS[1], greedy(10)))
        dropped = engine.submit(ask(PROMPTS[2], greedy(10)))
        engine.cancel(dropped)
        go_on.set()
        assert len(seen) + len(list(stream)) == 10
        assert len(finish(second).token_ids) == 10
        assert finish(dropped).finish_reason == "abort"


def test_cancelled_requests_end_while_a_model_is_waited_for(model: TinyModel) -> None:
    """And make room for others, however long that takes."""
    go_on = threading.Event()

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        assert go_on.wait(timeout=30)
        return healthy(model), {}

    with serving(model, LostInStep(model, 3), rebuild) as engine:
        running = engine.submit(ask(PROMPTS[0], greedy(10)))
        while engine.status().state != "recovering":
            go_on.wait(0.01)
        waiting = engine.submit(ask(PROMPTS[1], greedy(10)))
        other = engine.submit(ask(PROMPTS[2], greedy(10)))
        for request in (running, waiting):
            engine.cancel(request)
            assert finish(request).finish_reason == "abort"
        status = engine.status()
        assert (status.running_requests, status.waiting_requests) == (0, 1)
        go_on.set()
        assert len(finish(other).token_ids) == 10


def test_giving_up_ends_every_request_with_the_reason(model: TinyModel) -> None:
    gone = RankUnavailable("no actor for rank 1 (was on 10.0.0.2) within 5 s")

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        raise gone

    steps = LostInStep(model, 2)
    with serving(model, steps, rebuild) as engine:
        with steps.held():
            requests = [engine.submit(ask(prompt, params)) for prompt, params in REQUESTS]
        for request in requests:
            with pytest.raises(RankUnavailable, match=r"rank 1 \(was on 10\.0\.0\.2\)"):
                read(request)
        with pytest.raises(RankUnavailable):
            engine.submit(ask(PROMPTS[0], greedy()))
        assert engine.status().state == "failed"


@pytest.mark.parametrize("number", [0, 1])
def test_a_step_that_breaks_every_model_ends_its_requests(number: int, model: TinyModel) -> None:
    """The first chunk or the second: getting that far each time is no progress. Not the engine."""
    attempts: list[ExchangeError] = []

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        attempts.append(error)
        return (LostInStep(model, number) if len(attempts) < 6 else healthy(model)), {}

    with serving(model, LostInStep(model, number), rebuild) as engine:
        with pytest.raises(PeerLost):
            read(engine.submit(ask(PROMPTS[3], greedy())))
        assert len(finish(engine.submit(ask(PROMPTS[3], greedy(4)))).token_ids) == 4
    assert len(attempts) == 6


def test_closing_ends_a_recovery(model: TinyModel) -> None:
    closing = threading.Event()

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        assert closing.wait(timeout=30)
        raise CqilError("the pool was stopped")

    with serving(model, LostInStep(model, 1), rebuild) as engine:
        request = engine.submit(ask(PROMPTS[0], greedy()))
        while engine.status().state != "recovering":
            closing.wait(0.01)
        engine.close()
        with pytest.raises(CqilError, match="the engine was closed"):
            read(request)
        closing.set()


@pytest.mark.parametrize("given", [0, 1, 7, 14])
@pytest.mark.parametrize("index", range(len(REQUESTS)))
def test_a_broken_stream_goes_on_after_the_tokens_it_gave(
    index: int, given: int, model: TinyModel
) -> None:
    prompt, params = REQUESTS[index]
    with serving(model, healthy(model)) as engine:
        chunks = read(engine.submit(ask(prompt, params)))
        whole = chunks[-1].result
        assert whole is not None
        resumed = read(engine.submit(ask(prompt, params, resume_token_ids=whole.token_ids[:given])))
    texts = [chunk.text for chunk in chunks]
    assert "".join(chunk.text for chunk in resumed) == "".join(texts[given:])
    assert [id for c in resumed for id in c.token_ids] == list(whole.token_ids[given:])
    result = resumed[-1].result
    assert result is not None
    assert (result.text, result.token_ids, result.usage) == (
        whole.text,
        whole.token_ids,
        whole.usage,
    )


def test_a_stop_string_is_found_across_the_break(model: TinyModel) -> None:
    with serving(model, healthy(model)) as engine:
        whole = finish(engine.submit(ask(PROMPTS[0], greedy(20))))
        pieces = [model.tokenizer.decode([id]) for id in whole.token_ids]
        stop = (pieces[6] + pieces[7]).strip() or pieces[6] + pieces[7]
        params = greedy(20, stop=[stop])
        expected = finish(engine.submit(ask(PROMPTS[0], params)))
        assert expected.stop_reason == stop
        resumed = finish_from(engine, params, expected.token_ids[:-1])
    assert (resumed.text, resumed.stop_reason) == (expected.text, stop)


def finish_from(engine: Engine, params: SamplingParams, given: tuple[int, ...]) -> Completion:
    result = read(engine.submit(ask(PROMPTS[0], params, resume_token_ids=given)))[-1].result
    assert result is not None
    return result


def test_a_prompt_that_is_only_scored_goes_on_from_nothing(model: TinyModel) -> None:
    """Not even from tokens given with it: there may be no position left for them."""
    params = greedy(0, prompt_logprobs=0)
    prompt = random_tokens(MAX_LEN, 7)
    with serving(model, healthy(model)) as engine:
        plain, resumed = (
            finish(engine.submit(ask(prompt, params, resume_token_ids=given)))
            for given in ((), (5,))
        )
        assert resumed.token_ids == ()
        assert resumed.prompt_logprobs == plain.prompt_logprobs
        assert engine.status().recoveries == 0


def test_tokens_that_end_a_request_leave_nothing_to_compute(model: TinyModel) -> None:
    with serving(model, healthy(model)) as engine:
        given = random_tokens(5)
        (chunk,) = read(engine.submit(ask(PROMPTS[0], greedy(5), resume_token_ids=tuple(given))))
        assert chunk.finish_reason == "length"
        assert engine.status().steps == 0
        with pytest.raises(RequestError, match="outside the vocabulary"):
            engine.submit(ask(PROMPTS[0], greedy(5), resume_token_ids=(VOCAB,)))
