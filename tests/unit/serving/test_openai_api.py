"""The HTTP service as users of the `openai` package meet it: what they ask for is what they get."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from observed_engine import (
    MAX_LEN,
    PLAN,
    LostInStep,
    ObservedModel,
    ask,
    finish,
    greedy,
    serving,
)
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from served import MODEL, PacedModel, Served, served
from tiny_models import VOCAB, TinyModel, TinyModelFactory
from torch import Tensor
from watching import wait_for

from cqil_dist.errors import ExchangeError
from cqil_dist.runtime.engine import Engine, StepModel

ORIGINAL = "tiny-original"  # the same weights under the sequential plan
TEXT = "The harbour lies by the sea"
OTHERS = ("every morning", "The town")
MESSAGES: list[Any] = [
    {"role": "system", "content": "Go on."},
    {"role": "user", "content": "Is it far?"},
]
# Fields that the package's methods do not have.
EXTRAS = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "stop_token_ids",
    "return_token_ids",
    "return_timeline",
)
# Of OpenAI's completions.
OPTIONAL = (
    "n",
    "stop",
    "seed",
    "stream",
    "echo",
    "max_tokens",
    "logprobs",
    "top_p",
    "user",
    "suffix",
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stream_options",
)
PACE_S = 0.02  # a whole context takes a second


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
    """Two slots, and one more may wait; everything takes a while."""
    with (
        serving(model, paced, slots=2, max_waiting=1) as engine,
        served(engine, drain_timeout_s=20) as service,
    ):
        yield service
        wait_for(lambda: service.idle, "no request is left")


def openai_of(service: Served, **options: Any) -> OpenAI:
    url = f"{service.addresses.http}/v1"
    return OpenAI(
        **{"base_url": url, "api_key": "unasked", "max_retries": 0, "timeout": 30, **options}
    )


def arguments(options: dict[str, Any]) -> dict[str, Any]:
    """As the package takes them."""
    known = {name: value for name, value in options.items() if name not in EXTRAS}
    extra = {name: value for name, value in options.items() if name in EXTRAS}
    return {"model": MODEL, **known, "extra_body": extra}


def complete(client: OpenAI, prompt: Any, **options: Any) -> Completion:
    answer = client.completions.create(prompt=prompt, **arguments(options))
    assert isinstance(answer, Completion)
    return answer


def stream(client: OpenAI, prompt: Any, **options: Any) -> list[Completion]:
    return list(client.completions.create(prompt=prompt, stream=True, **arguments(options)))


def chat(client: OpenAI, messages: Any, **options: Any) -> ChatCompletion:
    answer = client.chat.completions.create(messages=messages, **arguments(options))
    assert isinstance(answer, ChatCompletion)
    return answer


def chat_stream(client: OpenAI, messages: Any, **options: Any) -> list[ChatCompletionChunk]:
    return list(
        client.chat.completions.create(messages=messages, stream=True, **arguments(options))
    )


def ids_of(choice: Any) -> list[int]:
    ids: list[int] = choice.model_extra["token_ids"]
    return ids


def text_of(events: Sequence[Completion], index: int = 0) -> str:
    return "".join(
        choice.text for event in events for choice in event.choices if choice.index == index
    )


def prompt_ids(model: TinyModel, text: str) -> list[int]:
    ids: list[int] = model.tokenizer(text)["input_ids"]
    return ids


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
        with pytest.raises(openai.NotFoundError, match="'another' is not served here; tiny, tiny-"):
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
    """Several prompts, several choices of each: as if each had been asked for by itself."""
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
    """It begins within one token and ends within the next."""
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


def expected_logprobs(model: TinyModel, name: str, ids: Sequence[int]) -> Tensor:
    """After each token but the last."""
    if name == ORIGINAL:
        logits = model.original_logits(ids)
    else:
        logits = model.reference_logits(model.plan(PLAN), ids)
    return logits[:-1].log_softmax(-1)


def check_logprobs(
    given: Any, model: TinyModel, rows: Tensor, ids: Sequence[int], alternatives: int
) -> None:
    """Entries are those of these tokens, each the model's row before it."""
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
    """The reference's under the plan and transformers' otherwise; sampling does not touch them."""
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
    """As evaluations ask: the first token follows nothing, the others what is before them."""
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
    """And not all at once in the end."""
    with openai_of(slow) as client:
        asked = arguments({"max_tokens": 20})
        events = client.completions.create(prompt=TEXT, stream=True, **asked)
        times = [time.monotonic() for _ in events]
    assert len(times) == 20
    assert times[-1] - times[0] > 10 * PACE_S


def test_asyncio_programs_get_the_same(client: OpenAI, service: Served) -> None:
    """Of the asynchronous client, many at a time."""

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


# Chat.


def laid_out(model: TinyModel, messages: Any) -> list[int]:
    ids: list[int] = model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    return ids


def test_a_conversation_is_laid_out_by_the_template(client: OpenAI, model: TinyModel) -> None:
    ids = laid_out(model, MESSAGES)
    answer = chat(client, MESSAGES, temperature=0, max_tokens=15)
    expected = complete(client, ids, temperature=0, max_tokens=15)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (expected.choices[0].text, "assistant")
    assert choice.finish_reason == "length"
    assert answer.usage == expected.usage
    assert answer.object == "chat.completion"


def test_a_conversation_goes_on_with_the_message_that_was_answered(client: OpenAI) -> None:
    """As programs do: the message object goes back as it came."""
    asked: list[Any] = [{"role": "user", "content": "Hi"}]
    message = chat(client, asked, temperature=0, max_tokens=4).choices[0].message
    plain = {"role": "assistant", "content": message.content}
    follow_up = {"role": "user", "content": "More"}
    for said in (message, message.model_dump(), plain):
        answer = chat(client, [*asked, said, follow_up], temperature=0, max_tokens=4)
        again = chat(client, [*asked, plain, follow_up], temperature=0, max_tokens=4)
        assert answer.choices[0].message.content == again.choices[0].message.content


def test_roles_and_contents_may_be_written_in_the_newer_ways(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "Go "}, {"type": "text", "text": "on."}]
    newer = [{"role": "developer", "content": parts}, *MESSAGES[1:]]
    options = {"temperature": 0, "max_tokens": 10}
    assert chat(client, newer, **options).choices == chat(client, MESSAGES, **options).choices
    newest = {"temperature": 0, "max_completion_tokens": 10}
    assert chat(client, newer, **newest).choices == chat(client, MESSAGES, **options).choices


def test_an_answer_goes_on_until_the_context_is_full(client: OpenAI) -> None:
    answer = chat(client, MESSAGES)
    assert answer.usage is not None
    assert answer.usage.total_tokens == MAX_LEN
    assert answer.choices[0].finish_reason == "length"


def test_log_probabilities_of_an_answer_s_tokens(client: OpenAI, model: TinyModel) -> None:
    ids = laid_out(model, MESSAGES)
    options = {"temperature": 0, "max_tokens": 12, "logprobs": True, "return_token_ids": True}
    (choice,) = chat(client, MESSAGES, top_logprobs=4, **options).choices
    assert choice.logprobs is not None
    entries = choice.logprobs.content
    assert entries is not None
    rows = expected_logprobs(model, MODEL, [*ids, *ids_of(choice)])[len(ids) - 1 :]
    for row, token_id, entry in zip(rows, ids_of(choice), entries, strict=True):
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
        best = row.topk(4)
        found = [each.logprob for each in entry.top_logprobs]
        assert found == pytest.approx(best.values.tolist(), abs=1e-3)
        texts = [model.tokenizer.decode([id]) for id in best.indices.tolist()]
        assert [each.token for each in entry.top_logprobs] == texts
        described: list[Any] = [entry, *entry.top_logprobs]
        for each in described:
            # Of a token that is a part of a character, the bytes are not known.
            known = None if "\N{REPLACEMENT CHARACTER}" in each.token else [*each.token.encode()]
            assert each.bytes == known
    events = chat_stream(client, MESSAGES, top_logprobs=4, **options)
    streamed = [event.choices[0].logprobs for event in events]
    assert [e for part in streamed if part for e in part.content or ()] == entries
    (bare,) = chat(client, MESSAGES, **options).choices
    assert bare.logprobs is not None
    assert all(entry.top_logprobs == [] for entry in bare.logprobs.content or ())
    assert chat(client, MESSAGES, max_tokens=1).choices[0].logprobs is None


def test_an_answer_s_stream_begins_with_the_role_and_ends_with_the_reason(client: OpenAI) -> None:
    options = {"n": 2, "seed": 4, "max_tokens": 10}
    whole = chat(client, MESSAGES, **options)
    *events, last = chat_stream(client, MESSAGES, **options, stream_options={"include_usage": True})
    assert (last.choices, last.usage) == ([], whole.usage)
    for choice in whole.choices:
        own = [each for event in events for each in event.choices if each.index == choice.index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert [part.delta.role for part in own[1:]] == [None] * (len(own) - 1)
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == "length"
    assert {event.object for event in events} == {"chat.completion.chunk"}


# Beyond OpenAI's fields.


def test_filters_that_leave_one_token_are_greedy(client: OpenAI) -> None:
    expected = complete(client, TEXT, temperature=0).choices[0].text
    for options in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}, {"temperature": 1e-7}):
        assert complete(client, TEXT, **options).choices[0].text == expected
    in_chat = {"max_tokens": 9}
    assert (
        chat(client, MESSAGES, top_k=1, **in_chat).choices
        == chat(client, MESSAGES, temperature=0, **in_chat).choices
    )


def test_a_repetition_penalty_is_the_engine_s(client: OpenAI, engine: Engine) -> None:
    expected = finish(engine.submit(ask(TEXT, greedy(20, repetition_penalty=2.0))))
    penalised = complete(client, TEXT, temperature=0, max_tokens=20, repetition_penalty=2.0)
    assert penalised.choices[0].text == expected.text
    assert expected.text != complete(client, TEXT, temperature=0, max_tokens=20).choices[0].text


def test_the_end_of_sequence_token_ends_unless_it_is_ignored(
    model: TinyModel, client: OpenAI
) -> None:
    """And so does any token that a request names, and then its answer says which."""
    options: dict[str, Any] = {"temperature": 0, "return_token_ids": True, "max_tokens": 10}
    whole = ids_of(complete(client, TEXT, **options).choices[0])
    eos = whole[4]
    steps = ObservedModel(model, model.plan(PLAN), 4)
    with (
        serving(model, steps, eos=[eos]) as engine,
        served(engine) as service,
        openai_of(service) as own,
    ):
        (ended,) = complete(own, TEXT, **options).choices
        (ignored,) = complete(own, TEXT, **options, ignore_eos=True).choices
    named = {**options, "stop_token_ids": [eos, 1]}
    (stopped,) = complete(client, TEXT, **named).choices
    for choice, reason in ((ended, None), (stopped, eos)):
        assert (ids_of(choice), choice.finish_reason) == (whole[:5], "stop")
        assert (choice.model_extra or {}).get("stop_reason") == reason
        assert not choice.text.endswith(model.tokenizer.decode([eos]))
    assert (ids_of(ignored), ignored.finish_reason) == (whole, "length")


def test_a_stream_brings_timelines_of_its_steps_where_they_are_asked_for(
    client: OpenAI, model: TinyModel
) -> None:
    events = stream(client, TEXT, max_tokens=6, return_timeline=True)
    timelines = [(event.choices[0].model_extra or {})["timeline"] for event in events]
    computed = len(prompt_ids(model, TEXT)) + 6 - 1  # the last token is not computed on
    assert sum(timeline["request_tokens"] for timeline in timelines) == computed
    steps = [timeline["step"] for timeline in timelines]
    assert steps == sorted(set(steps))
    assert all(timeline["duration_ms"] > 0 for timeline in timelines)
    for event in stream(client, TEXT, max_tokens=2):
        assert "timeline" not in (event.choices[0].model_extra or {})


def test_what_a_request_leaves_open_is_as_the_model_s_makers_say(engine: Engine) -> None:
    """In its generation_config.json; what a request says goes before that."""
    defaults = {"temperature": 0.0, "repetition_penalty": 2.0}
    with (
        served(engine, info={"default_sampling": defaults}) as service,
        openai_of(service) as client,
    ):
        default = complete(client, TEXT).choices[0].text
        no_penalty = complete(client, TEXT, repetition_penalty=1.0).choices[0].text
        warm = complete(client, TEXT, temperature=1.0, repetition_penalty=1.0, seed=3)
        in_chat = chat(client, MESSAGES, max_tokens=9).choices[0].message.content
    with served(engine) as service, openai_of(service) as client:
        penalised = {"temperature": 0, "repetition_penalty": 2.0}
        assert default == complete(client, TEXT, **penalised).choices[0].text
        assert no_penalty == complete(client, TEXT, temperature=0).choices[0].text != default
        assert warm.choices[0].text == complete(client, TEXT, seed=3).choices[0].text
        answer = chat(client, MESSAGES, max_tokens=9, **penalised)
        assert in_chat == answer.choices[0].message.content


def test_null_is_as_good_as_nothing(client: OpenAI) -> None:
    """Programs hand on what they were not given as None."""
    expected = complete(client, TEXT, temperature=0).choices[0].text
    nothing: dict[str, Any] = dict.fromkeys((*OPTIONAL, *EXTRAS))
    assert complete(client, TEXT, temperature=0, **nothing).choices[0].text == expected


# What is not as it should be.

MISTAKES: list[tuple[str, Any]] = [
    ("temperature", -1),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.5),
    ("n", 0),
    ("n", 129),
    ("n", "2"),
    ("n", 1.5),
    ("stop", 3),
    ("stop", ["a"] * 17),
    ("stop", ["a", 1]),
    ("seed", 2**63),
    ("seed", 1.5),
    ("stream_options", {"nonsense": True}),
    ("presence_penalty", 0.5),
    ("frequency_penalty", -0.5),
    ("logit_bias", {"5": 1}),
    ("top_k", -2),
    ("min_p", 1.1),
    ("repetition_penalty", 0),
    ("ignore_eos", 1),
    ("stop_token_ids", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [2**31]),
    ("return_token_ids", "yes"),
    ("nonsense", 1),
]
OF_COMPLETIONS: list[tuple[str, Any]] = [
    ("max_tokens", -1),
    ("max_tokens", 2**31),
    ("logprobs", 21),
    ("logprobs", True),
    ("suffix", "!"),
    ("echo", "yes"),
    ("prompt", {}),
    ("prompt", 5),
    ("prompt", ["a", 1]),
    ("prompt", [1, -1]),
    ("prompt", [[1], [2, 2**31]]),
    ("messages", MESSAGES),
]
OF_CHAT: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_completion_tokens", 0),
    ("logprobs", 3),
    ("top_logprobs", 21),
    ("messages", []),
    ("messages", "hi"),
    ("messages", [{"role": "tool", "content": "x"}]),
    ("messages", [{"role": "assistant", "content": None}]),
    ("messages", [{"role": "user", "content": []}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    ("messages", [{"role": "user", "content": "x", "name": "y"}]),
    ("tools", [{"type": "function"}]),
    ("tool_choice", "required"),
    ("response_format", {"type": "json_object"}),
    ("echo", True),
]


def refusal(client: OpenAI, path: str, body: dict[str, Any]) -> Any:
    """What a request is refused with, after which a good one is answered."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(path, body=body, cast_to=httpx.Response)
    assert complete(client, TEXT, max_tokens=1).choices
    error = caught.value
    assert error.type == "invalid_request_error"
    assert error.response.headers["content-type"] == "application/json"
    return error


@pytest.mark.parametrize(("field", "value"), [*MISTAKES, *OF_COMPLETIONS])
def test_a_mistake_in_a_completion_is_named(client: OpenAI, field: str, value: Any) -> None:
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 2, field: value}
    error = refusal(client, "/completions", body)
    assert error.param.split(".")[0] == field
    assert error.body["message"].startswith(field)


@pytest.mark.parametrize(("field", "value"), [*MISTAKES, *OF_CHAT])
def test_a_mistake_in_a_chat_is_named(client: OpenAI, field: str, value: Any) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, field: value}
    error = refusal(client, "/chat/completions", body)
    assert error.param.split(".")[0] == field
    assert error.body["message"].startswith(field)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is an empty list"),
        ({"prompt": [[1], []]}, "the prompt is empty"),
        ({"prompt": [VOCAB]}, "token ids [307] lie outside the vocabulary"),
        ({"prompt": [1] * MAX_LEN}, "the prompt has 64 tokens, but prompt and completion"),
        ({"prompt": ["x"] * 65, "n": 2}, "65 prompts with n=2 make 130 choices"),
        ({"stop": ["a", ""]}, "stop is ['a', '']"),
        ({"max_tokens": 0}, "max_tokens is 0, which is for scoring a prompt: set echo"),
        ({"echo": True, "stream": True}, "echo and stream are both set"),
        ({"best_of": 2}, "best_of is 2 but only n (1) is supported"),
    ],
)
def test_values_that_do_not_go_together_are_named(
    client: OpenAI, changes: dict[str, Any], message: str
) -> None:
    for streamed in (False, True):
        body = {"model": MODEL, "prompt": TEXT, "stream": streamed, **changes}
        assert message in refusal(client, "/completions", body).body["message"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_logprobs": 2}, "top_logprobs is set, but not logprobs"),
        ({"max_completion_tokens": 3}, "max_tokens is 2 and max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 99}]}, "the prompt has"),
    ],
)
def test_values_of_a_chat_that_do_not_go_together_are_named(
    client: OpenAI, changes: dict[str, Any], message: str
) -> None:
    for streamed in (False, True):
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "stream": streamed}
        error = refusal(client, "/chat/completions", {**body, **changes})
        assert message in error.body["message"]


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
    """Requests that run, and that wait."""
    status = service.engine.status()
    return status["running_requests"], status["waiting_requests"]


def test_beyond_the_queue_requests_are_told_to_come_back(slow: Served, paced: PacedModel) -> None:
    """Those within are answered all the same; and the package comes back by itself."""
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
    """With a status of its own before it has begun to answer, and with an error event after."""
    with (
        serving(model, paced, slots=2) as engine,
        served(engine, request_timeout_s=0.6) as service,
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
    """But for a pause: with new ranks it has the tokens that it would have had."""

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
        assert engine.status()["recoveries"] == 1


def test_an_engine_that_gave_up_is_said(model: TinyModel) -> None:
    """With a status of its own, or in the stream; and health asks for no more."""
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
    """Whether it runs, or waits for a slot; those beside it stay."""

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
    """Its own timeout closes the connection while nothing has been answered."""
    with openai_of(slow, timeout=0.3) as client, paced.held():
        for call in (complete, stream):
            with pytest.raises(openai.APITimeoutError):
                call(client, TEXT, max_tokens=50)
        wait_for(lambda: not slow.service.requests, "they have left")
    wait_for(lambda: slow.idle, "their slots are free")


def test_many_come_and_go_together(slow: Served) -> None:
    """Whatever they meet: an answer, a full queue, their own end."""
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
