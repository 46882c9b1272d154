"""Requests in, text out: what users of the engine see, over a real tiny model on one rank."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
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
from torch import Tensor

from cqil_dist.engine.engine import Engine
from cqil_dist.errors import CqilError, ExchangeError, PeerLost, QueueFull, RequestError
from cqil_dist.model.step import Step
from cqil_dist.outputs import Completion
from cqil_dist.sampling_params import SamplingParams
from cqil_dist.status import EngineStatus


class FailingModel(ObservedModel):
    """Breaks in its third step."""

    error: Exception = LOST

    def compute(self, step: Step) -> Tensor:
        logits = super().compute(step)
        if len(self.steps) == 3:
            raise self.error
        return logits


class OverflowingModel(ObservedModel):
    """Gives no numbers for the sequence in slot 0 at first, as an overflow in float16 does."""

    def compute(self, step: Step) -> Tensor:
        logits = super().compute(step).clone()
        slots = [segment.slot for segment in step.segments for _ in range(segment.wanted_logits)]
        for row, slot in zip(logits, slots, strict=True):
            if len(self.steps) == 1 and slot == 0:
                row[5] = float("nan")
        return logits


@pytest.fixture
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


@contextmanager
def observed(
    model: TinyModel, plan: str = PLAN, **options: Any
) -> Iterator[tuple[Engine, ObservedModel]]:
    steps = ObservedModel(model, model.plan(plan), options.get("slots", 4))
    with serving(model, steps, **options) as engine:
        yield engine, steps


def alone(
    model: TinyModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    plan: str = PLAN,
) -> list[Completion]:
    """What each prompt gives when nothing else runs."""
    with observed(model, plan) as (engine, _):
        return [finish(engine.submit(ask(prompt, params))) for prompt in prompts]


def original_continuation(
    model: TinyModel, prompt: Sequence[int], max_tokens: int, eos: int | None = None
) -> list[int]:
    output = model.original.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


def test_greedy_is_what_transformers_generates(model: TinyModel) -> None:
    completions = alone(model, PROMPTS, greedy(), plan="sequential")
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert list(completion.token_ids) == original_continuation(model, prompt, 12)
        assert completion.finish_reason == "length"
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (
            len(prompt),
            12,
        )


def test_text_prompts_are_encoded_and_output_is_decoded(model: TinyModel) -> None:
    text = "The harbour"
    prompt = model.tokenizer(text)["input_ids"]
    with observed(model) as (engine, _):
        from_text = finish(engine.submit(ask(text, greedy())))
        from_ids = finish(engine.submit(ask(prompt, greedy())))
    assert from_text.token_ids == from_ids.token_ids
    decoded = model.tokenizer.decode([*prompt, *from_text.token_ids], skip_special_tokens=True)
    assert from_text.text == decoded.removeprefix(text)


def test_chats_are_laid_out_by_the_model_s_template(model: TinyModel) -> None:
    messages = [{"role": "user", "content": "the news"}]
    with observed(model) as (engine, _):
        chat = finish(engine.submit(ask(messages, greedy())))
        plain = finish(engine.submit(ask("user: the news\nassistant: ", greedy())))
        assert chat.token_ids == plain.token_ids
        for refused in ([], [{"role": "user"}]):
            with pytest.raises(RequestError):
                engine.submit(ask(refused, greedy()))


def test_the_end_token_ends_the_output_as_in_transformers(model: TinyModel) -> None:
    prompt = PROMPTS[1]
    free = original_continuation(model, prompt, 12)
    eos = free[6]
    with observed(model, "sequential", eos=[eos]) as (engine, _):
        ended = finish(engine.submit(ask(prompt, greedy())))
        ignored = finish(engine.submit(ask(prompt, greedy(ignore_eos=True))))
    assert list(ended.token_ids) == original_continuation(model, prompt, 12, eos)
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert list(ignored.token_ids) == free


def test_stop_token_ids_end_the_output_and_say_so(model: TinyModel) -> None:
    (free,) = alone(model, PROMPTS[:1], greedy())
    stop = free.token_ids[5]
    end = free.token_ids.index(stop) + 1
    (ended,) = alone(model, PROMPTS[:1], greedy(stop_token_ids=(stop,)))
    assert ended.token_ids == free.token_ids[:end]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)


def test_stop_strings_cut_the_output_before_them(model: TinyModel) -> None:
    (free,) = alone(model, PROMPTS[:1], greedy(30))
    text = free.text
    # Two characters from the middle, which tokens may well share with their neighbours.
    middle = [text[i : i + 2] for i in range(len(text) // 3, len(text) - 1)]
    stop = next(pair for pair in middle if pair.isascii())
    (ended,) = alone(model, PROMPTS[:1], greedy(30, stop=("never", stop)))
    assert ended.text == text[: text.index(stop)]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    assert ended.token_ids == free.token_ids[: len(ended.token_ids)]
    assert len(ended.token_ids) < len(free.token_ids)


def test_logprobs_are_the_model_s(model: TinyModel) -> None:
    prompt = PROMPTS[1]
    (completion,) = alone(model, [prompt], greedy(logprobs=3))
    logits = model.reference_logits(model.plan("P2 S1 E5 D1"), [*prompt, *completion.token_ids])
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
    for row, entry in zip(expected, completion.logprobs, strict=True):
        best = row.topk(3)
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert [top.token_id for top in entry.top] == best.indices.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert entry.token == model.tokenizer.decode([entry.token_id])
    (without,) = alone(model, [prompt], greedy())
    assert without.logprobs is None


def test_requests_that_share_steps_give_what_they_give_alone(model: TinyModel) -> None:
    expected = alone(model, PROMPTS, greedy())
    with observed(model) as (engine, steps):
        with steps.held():
            requests = [engine.submit(ask(prompt, greedy())) for prompt in PROMPTS]
        together = [finish(request) for request in requests]
    assert max(len(step.segments) for step in steps.steps) == len(PROMPTS)
    assert [c.token_ids for c in together] == [c.token_ids for c in expected]


def test_seeded_samples_are_the_same_alone_and_in_a_batch(model: TinyModel) -> None:
    params = [
        SamplingParams(max_tokens=12, seed=seed, temperature=0.9, top_p=0.95, top_k=40)
        for seed in (1, 2, 3)
    ]
    prompt = PROMPTS[1]
    solo = [alone(model, [prompt], each)[0] for each in params]
    with observed(model) as (engine, steps):
        with steps.held():
            requests = [engine.submit(ask(prompt, each)) for each in params]
            others = [engine.submit(ask(other, SamplingParams(max_tokens=5))) for other in PROMPTS]
        batch = [finish(request) for request in requests]
        for other in others:
            finish(other)
    assert [c.token_ids for c in batch] == [c.token_ids for c in solo]
    assert len({c.token_ids for c in solo}) == len(params)
    assert [c.seed for c in solo] == [1, 2, 3]


def test_a_drawn_seed_is_told_and_gives_the_same_again(model: TinyModel) -> None:
    (first,) = alone(model, PROMPTS[:1], SamplingParams(max_tokens=12))
    (again,) = alone(model, PROMPTS[:1], SamplingParams(max_tokens=12, seed=first.seed))
    assert first.seed is not None
    assert again.token_ids == first.token_ids


def test_a_long_prompt_does_not_stop_who_is_decoding(model: TinyModel) -> None:
    short, long = PROMPTS[0], random_tokens(40, seed=9)
    expected = alone(model, [short, long], greedy())
    with observed(model, prefill_tokens=8) as (engine, steps):
        with steps.held():
            first = engine.submit(ask(short, greedy()))
            assert steps.started.wait(timeout=30)
            second = engine.submit(ask(long, greedy()))
        completions = [finish(first), finish(second)]
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    every = [step.segments for step in steps.steps]
    chunked = [step for step in every if any(segment.count == 8 for segment in step)]
    assert len(chunked) == 5
    for segments in chunked:
        assert len(segments) == 2
        assert [(s.count, s.wanted_logits) for s in segments if s.slot == 0] == [(1, 1)]


def test_more_requests_than_slots_take_turns(model: TinyModel) -> None:
    prompts = [random_tokens(4 + index, seed=index) for index in range(6)]
    expected = alone(model, prompts, greedy())
    with observed(model, slots=2) as (engine, steps):
        with steps.held():
            requests = [engine.submit(ask(prompt, greedy())) for prompt in prompts]
            status = engine.status()
            assert status.running_requests + status.waiting_requests == 6
        completions = [finish(request) for request in requests]
        assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
        assert {segment.slot for step in steps.steps for segment in step.segments} == {0, 1}
        assert max(len(step.segments) for step in steps.steps) == 2
        assert settled(engine) == EngineStatus(
            running_requests=0,
            waiting_requests=0,
            free_slots=2,
            slots=2,
            max_waiting=16,
            steps=len(steps.steps),
            state="serving",
            state_detail="",
            recoveries=0,
            last_recovery=None,
        )


def test_more_than_may_wait_are_refused_until_there_is_room(model: TinyModel) -> None:
    """But for one that goes on elsewhere: it was let in before."""
    with observed(model, slots=2, max_waiting=1) as (engine, steps):
        with steps.held():
            first = engine.submit(ask(PROMPTS[0], greedy()))
            others = [engine.submit(ask(PROMPTS[1], greedy())) for _ in range(2)]
            with pytest.raises(QueueFull, match="all 2 slots are taken, and 1 requests wait"):
                engine.submit(ask(PROMPTS[2], greedy()))
            given = alone(model, PROMPTS[2:3], greedy())[0].token_ids
            resumed = engine.submit(ask(PROMPTS[2], greedy(), resume_token_ids=given[:3]))
        assert finish(first).token_ids == alone(model, PROMPTS[:1], greedy())[0].token_ids
        result = read(resumed)[-1].result
        assert result is not None
        assert result.token_ids == given
        for other in others:
            finish(other)
        settled(engine)
        finish(engine.submit(ask(PROMPTS[2], greedy())))


def settled(engine: Engine) -> EngineStatus:
    """The status once the engine has put away what its readers have seen the end of."""
    finish(engine.submit(ask([1], greedy(1))))
    pause = threading.Event()
    for _ in range(500):
        if (status := engine.status()).free_slots == status.slots:
            break
        pause.wait(0.01)
    return engine.status()


def test_cancelling_frees_the_slot_for_the_next(model: TinyModel) -> None:
    expected = alone(model, PROMPTS[:3], greedy())
    with observed(model, slots=1) as (engine, steps):
        with steps.held():
            running = engine.submit(ask(PROMPTS[0], greedy(50)))
            waiting = engine.submit(ask(PROMPTS[1], greedy()))
            last = engine.submit(ask(PROMPTS[2], greedy()))
            engine.cancel(running)
            engine.cancel(waiting)
        aborted = [finish(running), finish(waiting)]
        assert finish(last).token_ids == expected[2].token_ids
        engine.cancel(last)  # too late, and harmless
        engine.cancel(running)
        assert finish(engine.submit(ask(PROMPTS[1], greedy()))).token_ids == expected[1].token_ids
        assert settled(engine).free_slots == 1
    assert [c.finish_reason for c in aborted] == ["abort", "abort"]
    # What was under way when it was cancelled is still given.
    assert aborted[0].token_ids == expected[0].token_ids[: len(aborted[0].token_ids)]
    assert len(aborted[0].token_ids) <= 1
    assert aborted[1].token_ids == ()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ("", "the prompt is empty"),
        ([1] * MAX_LEN, f"the prompt has {MAX_LEN} tokens, but prompt and completion together may"),
        ([1, VOCAB, -1], f"token ids [{VOCAB}, -1] lie outside the vocabulary (0 to {VOCAB - 1})"),
    ],
)
def test_a_bad_request_is_refused_and_touches_no_other(
    prompt: str | list[int], message: str, model: TinyModel
) -> None:
    expected = alone(model, PROMPTS[:2], greedy())
    with observed(model) as (engine, steps):
        with steps.held():
            before = engine.submit(ask(PROMPTS[0], greedy()))
            with pytest.raises(RequestError) as refusal:
                engine.submit(ask(prompt, greedy()))
            after = engine.submit(ask(PROMPTS[1], greedy()))
        assert [finish(before).token_ids, finish(after).token_ids] == [
            c.token_ids for c in expected
        ]
    assert message in str(refusal.value)


@pytest.mark.parametrize("params", [greedy(), greedy(0, prompt_logprobs=0)])
def test_a_request_without_finite_logits_fails_by_itself(
    params: SamplingParams, model: TinyModel
) -> None:
    expected = alone(model, PROMPTS[:2], greedy())
    steps = OverflowingModel(model, model.plan("P2 S1 E5 D1"), slots=2)
    with serving(model, steps, slots=2) as engine:
        with steps.held():
            failing = engine.submit(ask(PROMPTS[0], params))
            good = engine.submit(ask(PROMPTS[1], greedy()))
        with pytest.raises(CqilError, match="NaN or infinite"):
            read(failing)
        assert finish(good).token_ids == expected[1].token_ids


@pytest.mark.parametrize(("prompt_length", "tokens"), [(10, 6), (15, 1)])
def test_the_context_ends_with_its_last_token(
    prompt_length: int, tokens: int, model: TinyModel
) -> None:
    prompt = random_tokens(prompt_length)
    with observed(model, max_len=16) as (engine, _):
        completion = finish(engine.submit(ask(prompt, greedy(50))))
        with pytest.raises(RequestError, match="16 tokens"):
            engine.submit(ask(random_tokens(16), greedy()))
    (expected,) = alone(model, [prompt], greedy(tokens))
    assert completion.token_ids == expected.token_ids
    assert len(completion.token_ids) == tokens
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    "error",
    [
        PeerLost(1, "10.0.0.2:4711", "it closed the connection"),
        ExchangeError("rank 1: CheckpointError"),
        RuntimeError("out of memory"),
    ],
    ids=["peer_lost", "rank_failed", "anything_else"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_fails_ends_every_request_with_its_reason(
    error: Exception, model: TinyModel
) -> None:
    before = set(threading.enumerate())
    steps = FailingModel(model, model.plan("sequential"), slots=2)
    steps.error = error
    with serving(model, steps, slots=2) as engine:
        with steps.held():
            requests = [engine.submit(ask(prompt, greedy(20))) for prompt in PROMPTS]
        for request in requests:
            with pytest.raises(CqilError) as failure:
                read(request, timeout_s=5)
            assert str(error) in str(failure.value)
        with pytest.raises(CqilError, match=str(error)):
            engine.submit(ask(PROMPTS[0], greedy()))
        assert engine.status().running_requests == 0
        assert engine.status().waiting_requests == 0
    assert_threads_end(before)


def test_a_finished_request_keeps_its_answer_when_the_next_step_fails(model: TinyModel) -> None:
    steps = LostInStep(model, 1, sent=True)
    with serving(model, steps) as engine:
        with steps.held():
            done = engine.submit(ask(random_tokens(5), greedy(1), final_only=True))
            going_on = engine.submit(ask(random_tokens(5, seed=1), greedy(9)))
        assert len(finish(done).token_ids) == 1
        with pytest.raises(PeerLost, match="rank 1"):
            read(going_on)


def test_closing_ends_all_streams_and_the_thread(model: TinyModel) -> None:
    before = set(threading.enumerate())
    with observed(model, slots=1) as (engine, steps):
        with steps.held():
            requests = [engine.submit(ask(prompt, greedy(50))) for prompt in PROMPTS]
            engine.close()
            for request in requests:
                with pytest.raises(CqilError, match="the engine was closed"):
                    read(request)
        engine.close()
        with pytest.raises(CqilError, match="the engine was closed"):
            engine.submit(ask(PROMPTS[0], greedy()))
    assert_threads_end(before)


def assert_threads_end(before: set[threading.Thread]) -> None:
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_timings_have_an_entry_for_every_token(model: TinyModel) -> None:
    (completion,) = alone(model, PROMPTS[:1], greedy(5))
    assert completion.timings.ttft_ms > 0
    assert len(completion.timings.itl_ms) == 4
