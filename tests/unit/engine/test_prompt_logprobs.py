"""How probable the prompt's own tokens are: what the model says of them, in whatever steps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from helpers.observed_engine import (
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
from helpers.tiny_models import END_OF_TEXT, TinyModel, TinyModelFactory, random_tokens
from torch import Tensor

from cqil_dist.engine.engine import StepModel
from cqil_dist.errors import ExchangeError
from cqil_dist.inputs import Prompt
from cqil_dist.outputs import Completion
from cqil_dist.sampling_params import SamplingParams

PREFILL_TOKENS = 8
LONG = random_tokens(41, seed=41)  # six steps, if it has them to itself
EOS_ID = 0


@pytest.fixture
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


def on(model: TinyModel, plan: str, slots: int = 4) -> ObservedModel:
    return ObservedModel(model, model.plan(plan), slots)


def check(
    completion: Completion,
    model: TinyModel,
    prompt: Sequence[int],
    logits: Tensor,
    alternatives: int,
) -> None:
    """One entry for each token, as log_softmax of the logits after the token before has it."""
    entries = completion.prompt_logprobs
    assert entries is not None
    assert [entry.token_id for entry in entries] == list(prompt)
    assert [entry.token for entry in entries] == [model.tokenizer.decode([id]) for id in prompt]
    assert (entries[0].logprob, entries[0].top) == (None, ())
    for row, entry in zip(logits[:-1].log_softmax(-1), entries[1:], strict=True):
        best = row.topk(alternatives)
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert [top.token_id for top in entry.top] == best.indices.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("length", [1, 2, PREFILL_TOKENS, PREFILL_TOKENS + 1, len(LONG)])
def test_they_are_transformers(length: int, model: TinyModel) -> None:
    """Of a single token, and of prompts that just fit a step, just do not, and take several."""
    prompt = LONG[:length]
    steps = on(model, "sequential")
    with serving(model, steps, prefill_tokens=PREFILL_TOKENS) as engine:
        completion = finish(engine.submit(ask(prompt, greedy(4, prompt_logprobs=3))))
        without = finish(engine.submit(ask(prompt, greedy(4))))
    check(completion, model, prompt, model.original_logits(prompt), 3)
    assert max(s.count for step in steps.steps for s in step.segments) <= PREFILL_TOKENS
    assert without.prompt_logprobs is None
    assert completion.token_ids == without.token_ids


def test_they_are_the_same_beside_other_requests(model: TinyModel) -> None:
    """Beside one that decodes, others that want them too, and one whose prompt nobody asks of."""
    asked: tuple[tuple[Sequence[int], SamplingParams], ...] = (
        (LONG, greedy(12, prompt_logprobs=2)),
        (PROMPTS[3], SamplingParams(max_tokens=5, seed=3, logprobs=1, prompt_logprobs=0)),
        (PROMPTS[1], greedy(0, prompt_logprobs=1)),
        (PROMPTS[2], greedy(5)),
    )
    steps = on(model, "sequential", slots=5)
    with serving(model, steps, slots=5, prefill_tokens=PREFILL_TOKENS) as engine:
        with steps.held():
            decoding = engine.submit(ask(PROMPTS[0], greedy(30)))
            assert steps.started.wait(timeout=30)
            requests = [engine.submit(ask(*each)) for each in asked]
        together = [finish(request) for request in requests]
        beside = finish(decoding)
        alone = [finish(engine.submit(ask(*each))) for each in asked]
        free = finish(engine.submit(ask(PROMPTS[0], greedy(30))))
    assert max(len(step.segments) for step in steps.steps) > 3
    for completion, (prompt, params) in zip(together, asked, strict=True):
        if params.prompt_logprobs is None:
            assert completion.prompt_logprobs is None
        else:
            logits = model.original_logits(prompt)
            check(completion, model, prompt, logits, params.prompt_logprobs)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert beside.token_ids == free.token_ids
    assert len(together[1].logprobs or ()) == 5


@pytest.mark.parametrize("final_only", [True, False])
def test_no_tokens_may_be_wanted_but_the_prompt_s(final_only: bool, model: TinyModel) -> None:
    """As evaluations ask: the stream is one chunk, and the slot is free for the next."""
    params = SamplingParams(max_tokens=0, logprobs=1, prompt_logprobs=2)
    with serving(model, on(model, "sequential"), slots=1, prefill_tokens=PREFILL_TOKENS) as engine:
        for prompt in (LONG, PROMPTS[0]):
            (chunk,) = read(engine.submit(ask(prompt, params, final_only=final_only)))
            assert (chunk.text, chunk.token_ids) == ("", ())
            assert chunk.finish_reason == "length"
            result = chunk.result
            assert result is not None
            check(result, model, prompt, model.original_logits(prompt), 2)
            assert (result.text, result.token_ids, result.logprobs) == ("", (), ())
            assert (result.finish_reason, result.stop_reason) == ("length", None)
            assert result.usage.to_dict() == {
                "prompt_tokens": len(prompt),
                "completion_tokens": 0,
                "total_tokens": len(prompt),
            }
        # Not even those may be wanted.
        nothing = finish(engine.submit(ask(LONG, greedy(0))))
        assert (nothing.token_ids, nothing.finish_reason) == ((), "length")
        assert nothing.prompt_logprobs is None


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside_another"])
@pytest.mark.parametrize("sent", [True, False], ids=["when_sent", "when_due"])
@pytest.mark.parametrize("numbers", [(0,), (1,), (3,), (5,), (8,), (2, 4, 1)])
def test_a_loss_neither_costs_an_entry_nor_doubles_one(
    numbers: tuple[int, ...], sent: bool, beside: bool, model: TinyModel
) -> None:
    """It falls into any chunk of the prompt, or after it; or further losses follow."""
    first, *others = (LostInStep(model, number, sent) for number in numbers)
    lives = iter(others)

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        return next(lives, on(model, PLAN)), {}

    with serving(model, first, rebuild, prefill_tokens=PREFILL_TOKENS) as engine:
        with first.held():
            request = engine.submit(ask(LONG, greedy(5, prompt_logprobs=2)))
            if beside:
                engine.submit(ask(PROMPTS[3], greedy(9, prompt_logprobs=0)))
        completion = finish(request)
        assert engine.status().recoveries == len(numbers)
    with serving(model, on(model, PLAN)) as engine:
        undisturbed = finish(engine.submit(ask(LONG, greedy(5))))
    check(completion, model, LONG, model.reference_logits(model.plan(PLAN), LONG), 2)
    assert completion.token_ids == undisturbed.token_ids


@pytest.mark.parametrize("lost_in", [None, 2], ids=["undisturbed", "lost"])
@pytest.mark.parametrize("given", [1, 4, 9, 10])
def test_a_stream_that_goes_on_elsewhere_brings_them_too(
    given: int, lost_in: int | None, model: TinyModel
) -> None:
    """Its reader has no other result; the tokens it has already are no part of the prompt."""
    params = SamplingParams(max_tokens=10, seed=5, prompt_logprobs=2)

    def rebuild(error: ExchangeError) -> tuple[StepModel, dict[str, float]]:
        return on(model, PLAN), {}

    with serving(model, on(model, PLAN), prefill_tokens=PREFILL_TOKENS) as engine:
        whole = finish(engine.submit(ask(LONG, params)))
    steps = on(model, PLAN) if lost_in is None else LostInStep(model, lost_in)
    with serving(model, steps, rebuild, prefill_tokens=PREFILL_TOKENS) as engine:
        had = whole.token_ids[:given]
        chunks = read(engine.submit(ask(LONG, params, resume_token_ids=had)))
    resumed = chunks[-1].result
    assert resumed is not None
    check(resumed, model, LONG, model.reference_logits(model.plan(PLAN), LONG), 2)
    assert resumed.token_ids == whole.token_ids
    assert [id for chunk in chunks for id in chunk.token_ids] == list(whole.token_ids[given:])


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("The  harbour ", "The  harbour "),
        ([EOS_ID, *PROMPTS[1]], None),
        ([{"role": "user", "content": "the news"}], "user: the news\nassistant: "),
    ],
    ids=["text", "token_ids", "chat"],
)
def test_the_prompt_s_text_comes_with_echo(
    prompt: Prompt, text: str | None, model: TinyModel
) -> None:
    """As it was written, and for token ids as they read, special tokens and all."""
    with serving(model, on(model, PLAN)) as engine:
        echoed = finish(engine.submit(ask(prompt, greedy(3), echo=True)))
        plain = finish(engine.submit(ask(prompt, greedy(3))))
    if text is None:
        text = END_OF_TEXT + model.tokenizer.decode(PROMPTS[1])
    assert echoed.prompt_text == text
    assert plain.prompt_text is None
    # It is no part of the output.
    assert (echoed.text, echoed.token_ids) == (plain.text, plain.token_ids)


def test_entries_and_text_are_of_the_same_prompt(model: TinyModel) -> None:
    """What the completions API echoes: the text, and how probable each part of it is."""
    with serving(model, on(model, PLAN)) as engine:
        params = greedy(0, prompt_logprobs=0)
        completion = finish(engine.submit(ask("The harbour lies by the sea", params, echo=True)))
    assert completion.prompt_logprobs is not None
    parts = [entry.token for entry in completion.prompt_logprobs]
    assert "".join(parts) == completion.prompt_text == "The harbour lies by the sea"
