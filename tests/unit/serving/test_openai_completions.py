"""Completions through the `openai` package, whose users get what they ask for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest
from helpers.observed_engine import (
    MAX_LEN,
    ask,
    finish,
    greedy,
)
from helpers.openai_calls import (
    MESSAGES,
    ORIGINAL,
    OTHERS,
    PACE_S,
    TEXT,
    arguments,
    chat,
    complete,
    expected_logprobs,
    ids_of,
    openai_of,
    prompt_ids,
    stream,
    text_of,
)
from helpers.served import MODEL, Served
from helpers.tiny_models import VOCAB, TinyModel
from openai import AsyncOpenAI, OpenAI
from torch import Tensor

from cqil_dist.engine.engine import Engine

# The models.


def test_models_are_listed_and_found(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, ORIGINAL]
    found = client.models.retrieve(ORIGINAL)
    assert (found.id, found.object, found.owned_by) == (ORIGINAL, "model", "cqil_dist")
    assert found.model_extra == {"max_model_len": MAX_LEN}


def test_a_model_that_is_not_served_is_not_found(client: OpenAI) -> None:
    for call in (
        lambda: client.models.retrieve("another"),
        lambda: complete(client, TEXT, model="another"),
        lambda: chat(client, MESSAGES, model="another"),
    ):
        with pytest.raises(
            openai.NotFoundError, match="'another' is not served here; served: tiny, tiny-"
        ):
            call()


# Completions.


def test_a_text_is_continued_as_the_engine_does(
    client: OpenAI, engine: Engine, model: TinyModel
) -> None:
    expected = finish(engine.submit(ask(TEXT, greedy(20))))
    answer = complete(client, TEXT, max_tokens=20, temperature=0, return_token_ids=True)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (expected.text, "length", 0)
    assert ids_of(choice) == list(expected.token_ids)
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert abs(answer.created - time.time()) < 60
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt_ids(model, TEXT))
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == len(prompt_ids(model, TEXT)) + 20


def test_16_tokens_are_generated_where_nothing_is_said(client: OpenAI) -> None:
    usage = complete(client, TEXT).usage
    assert usage is not None
    assert usage.completion_tokens == 16


@pytest.mark.parametrize("kind", ["texts", "token ids"])
def test_choices_are_in_order_and_a_prompt_counts_once(
    client: OpenAI, model: TinyModel, kind: str
) -> None:
    """Each choice of several prompts is as if it had been asked for by itself."""
    prompts = [TEXT, *OTHERS]
    ids = [prompt_ids(model, text) for text in prompts]
    options = {"max_tokens": 9, "return_token_ids": True}
    asked = prompts if kind == "texts" else ids
    answer = complete(client, asked, n=2, seed=7, **options)
    alone = [
        complete(client, prompt, seed=7 + choice, **options).choices[0]
        for prompt in prompts
        for choice in range(2)
    ]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    assert [ids_of(choice) for choice in answer.choices] == [ids_of(choice) for choice in alone]
    assert [choice.text for choice in answer.choices] == [choice.text for choice in alone]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(each) for each in ids)
    assert answer.usage.completion_tokens == 6 * 9
    assert complete(client, ids[0], temperature=0).choices[0].text == (
        complete(client, TEXT, temperature=0).choices[0].text
    )


def test_choices_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    def choices(**options: Any) -> list[str]:
        answer = complete(client, TEXT, n=4, max_tokens=12, **options)
        return [choice.text for choice in answer.choices]

    assert len(set(choices())) == 4
    assert choices() != choices()
    assert len(set(choices(seed=5))) == 4
    assert choices(seed=5) == choices(seed=5) != choices(seed=6)
    assert len(choices(seed=2**63 - 1)) == 4  # there is no seed after it
    assert choices(seed=-1)[1] == choices(seed=0)[0]


@pytest.mark.parametrize("stop", ["ng", ["nothing like it", "ng", "gh"]])
def test_a_stop_text_ends_the_completion_and_is_no_part_of_it(
    client: OpenAI, model: TinyModel, stop: Any
) -> None:
    """The stop text begins within one token and ends within the next."""
    whole = complete(client, TEXT, temperature=0).choices[0].text
    assert "ng" in whole
    asked = {"stop": stop, "temperature": 0, "return_token_ids": True}
    (choice,) = complete(client, TEXT, **asked).choices
    assert (choice.text, choice.finish_reason) == (whole.partition("ng")[0], "stop")
    assert choice.model_extra is not None
    assert choice.model_extra["stop_reason"] == "ng"
    assert model.tokenizer.decode(ids_of(choice)).startswith(choice.text + "ng")
    events = stream(client, TEXT, **asked)
    assert text_of(events) == choice.text
    assert events[-1].choices[0].finish_reason == "stop"
    assert events[-1].choices[0].model_extra == {"token_ids": [289], "stop_reason": "ng"}


# Log probabilities.


def check_logprobs(
    given: Any, model: TinyModel, rows: Tensor, ids: Sequence[int], alternatives: int
) -> None:
    """Check that entries are of these tokens, with the model's log probabilities of them."""
    texts = [model.tokenizer.decode([token_id]) for token_id in range(VOCAB)]
    assert given.tokens == [texts[token_id] for token_id in ids]
    of_ids = [float(row[token_id]) for row, token_id in zip(rows, ids, strict=True)]
    assert given.token_logprobs == pytest.approx(of_ids, abs=1e-3)
    for row, token_id, found in zip(rows, ids, given.top_logprobs, strict=True):
        expected: dict[str, float] = {}
        for each in [*row.topk(alternatives).indices.tolist(), token_id]:
            expected.setdefault(texts[each], float(row[each]))
        assert found == pytest.approx(expected, abs=1e-3)
    lengths = [len(text) for text in given.tokens]
    assert given.text_offset == [sum(lengths[:place]) for place in range(len(lengths))]


@pytest.mark.parametrize("name", [MODEL, ORIGINAL])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.8, "top_k": 90, "seed": 3}]
)
def test_log_probabilities_are_the_model_s(
    client: OpenAI, model: TinyModel, name: str, sampling: dict[str, Any]
) -> None:
    """They are the reference's under a plan and transformers' otherwise; sampling changes none."""
    options = {"max_tokens": 12, "logprobs": 3, "return_token_ids": True, **sampling}
    (choice,) = complete(client, TEXT, model=name, **options).choices
    assert choice.logprobs is not None
    ids, first = ids_of(choice), len(prompt_ids(model, TEXT))
    rows = expected_logprobs(model, name, [*prompt_ids(model, TEXT), *ids])[first - 1 :]
    check_logprobs(choice.logprobs, model, rows, ids, 3)
    events = stream(client, TEXT, model=name, **options)
    streamed = [event.choices[0].logprobs for event in events]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        in_parts = [item for part in streamed if part for item in getattr(part, field)]
        assert in_parts == getattr(choice.logprobs, field)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("name", [MODEL, ORIGINAL])
@pytest.mark.parametrize("prompt", ["text", "token ids"])
def test_an_echoed_prompt_is_scored(
    client: OpenAI, model: TinyModel, prompt: str, name: str, max_tokens: int
) -> None:
    """Evaluations ask for this; the first token has no log probability, as it follows nothing."""
    ids = prompt_ids(model, TEXT)
    answer = complete(
        client,
        TEXT if prompt == "text" else ids,
        model=name,
        echo=True,
        max_tokens=max_tokens,
        logprobs=2,
        temperature=0,
        return_token_ids=True,
    )
    (choice,) = answer.choices
    assert choice.text.startswith(TEXT)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), max_tokens)
    assert choice.finish_reason == "length"
    given: Any = choice.logprobs
    for entries in (given.token_logprobs, given.top_logprobs):
        assert entries[0] is None
    for offset, token in zip(given.text_offset, given.tokens, strict=True):
        assert choice.text[offset:].startswith(token)
    assert len(given.tokens) == len(ids) + max_tokens
    rest = [*ids[1:], *ids_of(choice)]
    rows = expected_logprobs(model, name, [ids[0], *rest])
    for entries in (given.tokens, given.token_logprobs, given.top_logprobs, given.text_offset):
        del entries[0]
    given.text_offset = [offset - len("The") for offset in given.text_offset]
    check_logprobs(given, model, rows, rest, 2)


def test_each_choice_echoes_its_own_prompt(client: OpenAI) -> None:
    plain = complete(client, list(OTHERS), n=2, seed=1, max_tokens=5)
    echoed = complete(client, list(OTHERS), n=2, seed=1, max_tokens=5, echo=True)
    assert [choice.text for choice in echoed.choices] == [
        OTHERS[place // 2] + choice.text for place, choice in enumerate(plain.choices)
    ]


# Streams.


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "max_tokens": 30},
        {"seed": 11, "max_tokens": 25},
        {"seed": 12, "max_tokens": 1},
        {"temperature": 0, "stop": "ng"},
        {"seed": 13, "n": 3},
    ],
)
def test_a_stream_is_the_whole_answer_in_parts(client: OpenAI, options: dict[str, Any]) -> None:
    prompts = [TEXT, *OTHERS]
    options = {**options, "return_token_ids": True}
    whole = complete(client, prompts, **options)
    *events, last = stream(client, prompts, **options, stream_options={"include_usage": True})
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {(event.id, event.model, event.object) for event in [*events, last]} == {
        (last.id, MODEL, "text_completion")
    }
    assert all(event.usage is None for event in events)
    for choice in whole.choices:
        own = [each for event in events for each in event.choices if each.index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert [id for part in own for id in ids_of(part)] == ids_of(choice)
        assert [part.finish_reason for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
    without = stream(client, prompts, **options)
    assert len(without) == len(events)
    assert all(event.choices and event.usage is None for event in without)


def test_a_stream_comes_as_it_is_generated(slow: Served) -> None:
    """Its events do not come all at once in the end."""
    with openai_of(slow) as client:
        asked = arguments({"max_tokens": 45})
        events = client.completions.create(prompt=TEXT, stream=True, **asked)
        times = [time.monotonic() for _ in events]
    assert len(times) == 45
    assert times[-1] - times[0] > 10 * PACE_S


def test_asyncio_programs_get_the_same(client: OpenAI, service: Served) -> None:
    """Many calls of the asynchronous client run at a time."""

    async def gather() -> list[str]:
        async with AsyncOpenAI(
            base_url=client.base_url, api_key="unasked", max_retries=0, timeout=30
        ) as own:

            async def whole(seed: int) -> str:
                asked = arguments({"seed": seed})
                return str((await own.completions.create(prompt=TEXT, **asked)).choices[0].text)

            async def streamed(seed: int) -> str:
                asked = arguments({"seed": seed, "stream": True})
                parts = await own.completions.create(prompt=TEXT, **asked)
                return "".join([part.choices[0].text async for part in parts])

            async def answered(seed: int) -> str:
                asked = arguments({"seed": seed, "max_tokens": 16, "messages": MESSAGES})
                answer = await own.chat.completions.create(**asked)
                return str(answer.choices[0].message.content)

            kinds: tuple[Callable[[int], Any], ...] = (whole, streamed, answered)
            texts: list[str] = await asyncio.gather(
                *(kind(seed) for seed in range(4) for kind in kinds)
            )
            return texts

    texts = asyncio.run(gather())
    for seed in range(4):
        alone = complete(client, TEXT, seed=seed).choices[0].text
        in_chat = chat(client, MESSAGES, seed=seed, max_tokens=16).choices[0].message.content
        assert texts[3 * seed : 3 * seed + 3] == [alone, alone, in_chat]
