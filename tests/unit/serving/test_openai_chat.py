"""Chat completions, and the fields beyond OpenAI's, through the `openai` package."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.observed_engine import (
    MAX_LEN,
    PLAN,
    ObservedModel,
    ask,
    finish,
    greedy,
    serving,
)
from helpers.openai_calls import (
    EXTRAS,
    MESSAGES,
    OPTIONAL,
    TEXT,
    chat,
    chat_stream,
    complete,
    expected_logprobs,
    ids_of,
    openai_of,
    prompt_ids,
    stream,
)
from helpers.served import MODEL, served
from helpers.tiny_models import TinyModel
from openai import OpenAI

from cqil_dist.engine.engine import Engine

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
    """Programs send back the message object as it came."""
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
    newer = [{"role": "developer", "content": parts, "name": "kim"}, *MESSAGES[1:]]
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
    """Any token that a request names ends it, too, and the answer tells which."""
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
    """Values of generation_config.json apply where a request gives none."""
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
    """Programs pass on values that they were not given as null."""
    expected = complete(client, TEXT, temperature=0).choices[0].text
    nothing: dict[str, Any] = dict.fromkeys((*OPTIONAL, *EXTRAS))
    assert complete(client, TEXT, temperature=0, **nothing).choices[0].text == expected
