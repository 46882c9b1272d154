"""Tokens in, chunks out: what the reader of an answer gets, whoever chose the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from helpers.tiny_models import byte_level_tokenizer

from cqil_dist.engine.answer import Answer
from cqil_dist.engine.detokenizer import Detokenizer
from cqil_dist.engine.sampler import SampledToken
from cqil_dist.inputs import GenerationInput
from cqil_dist.outputs import Chunk
from cqil_dist.sampling_params import SamplingParams

TOKENIZER: Any = byte_level_tokenizer()
EOS_ID = 0
MAX_LEN = 20
PROMPT: list[int] = TOKENIZER.encode("To ").ids
OUTPUT: list[int] = TOKENIZER.encode("be or").ids


def answer(*, final_only: bool = False, **settings: Any) -> Answer:
    params = SamplingParams(**{"max_tokens": 10, **settings})
    given = GenerationInput(PROMPT, params, final_only=final_only)
    detokenizer = Detokenizer(TOKENIZER, PROMPT, params.stop)
    return Answer(given, PROMPT, detokenizer, [EOS_ID], MAX_LEN, seed=5)


def add(to: Answer, token_ids: Sequence[int]) -> None:
    for token_id in token_ids:
        to.add(SampledToken(token_id))


def held(of: Answer) -> list[Chunk]:
    chunks = [item for item in of.stream.held if isinstance(item, Chunk)]
    assert len(chunks) == len(of.stream.held)
    return chunks


@pytest.mark.parametrize("final_only", [False, True])
def test_chunks_say_all_that_the_completion_says(final_only: bool) -> None:
    given = answer(final_only=final_only)
    add(given, [*OUTPUT, EOS_ID])
    assert given.finished
    chunks = held(given)
    assert len(chunks) == (1 if final_only else len(OUTPUT) + 1)
    result = chunks[-1].result
    assert result is not None
    assert result.text == "".join(chunk.text for chunk in chunks) == "be or"
    tokens = [token_id for chunk in chunks for token_id in chunk.token_ids]
    assert list(result.token_ids) == tokens == [*OUTPUT, EOS_ID]
    assert (result.finish_reason, result.stop_reason, result.seed) == ("stop", None, 5)
    assert result.usage.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize(
    ("settings", "reason", "stop_reason"),
    [
        ({"max_tokens": 2}, "length", None),
        ({"stop_token_ids": [OUTPUT[1]]}, "stop", OUTPUT[1]),
        ({"stop_token_ids": [EOS_ID, OUTPUT[1]]}, "stop", OUTPUT[1]),
    ],
)
def test_the_token_that_ends_an_output_is_its_last(
    settings: dict[str, Any], reason: str, stop_reason: int | None
) -> None:
    given = answer(**settings)
    add(given, OUTPUT[:1])
    assert given.ending is None
    add(given, OUTPUT[1:2])
    last = held(given)[-1]
    assert (last.finish_reason, last.stop_reason) == (reason, stop_reason)
    assert given.finished


def test_prompt_and_output_share_the_context() -> None:
    given = answer(max_tokens=1000)
    room = MAX_LEN - len(PROMPT)
    add(given, [OUTPUT[0]] * (room - 1))
    assert given.ending is None
    add(given, OUTPUT[:1])
    assert held(given)[-1].finish_reason == "length"


def test_a_token_that_is_both_kinds_of_end_is_the_model_s_own() -> None:
    for ignore_eos, stop_reason in ((False, None), (True, EOS_ID)):
        given = answer(stop_token_ids=[EOS_ID], ignore_eos=ignore_eos)
        add(given, [EOS_ID])
        assert held(given)[-1].stop_reason == stop_reason


def test_appended_tokens_make_no_chunk_and_are_in_the_completion() -> None:
    given = answer(max_tokens=len(OUTPUT))
    for token_id in OUTPUT[:-1]:
        given.append(token_id)
    assert held(given) == []
    add(given, OUTPUT[-1:])
    (chunk,) = held(given)
    assert chunk.token_ids == (OUTPUT[-1],)
    assert chunk.result is not None
    assert (chunk.result.text, chunk.result.token_ids) == ("be or", tuple(OUTPUT))


def test_what_may_become_a_stop_string_is_given_at_an_abort() -> None:
    given = answer(stop=["be or not"])
    add(given, OUTPUT)
    assert "".join(chunk.text for chunk in held(given)) == ""
    given.abort()
    chunks = list(given.stream)  # released at once
    assert chunks[-1].text == "be or"
    assert chunks[-1].finish_reason == "abort"
