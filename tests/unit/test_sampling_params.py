"""What a user may ask for, and what they are told when they may not."""

import json
from typing import Any

import pytest

from cqil_dist.errors import RequestError
from cqil_dist.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is -1 but must be from 0 to"),
        ({"max_tokens": 2.0}, "max_tokens is 2.0 but must be a whole number"),
        ({"max_tokens": True}, "max_tokens is True but must be a whole number"),
        ({"temperature": -0.1}, r"temperature is -0.1 but must be 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature is nan but must be a finite number"),
        ({"temperature": float("inf")}, "temperature is inf but must be a finite number"),
        ({"temperature": "hot"}, "temperature is 'hot' but must be a number"),
        ({"top_p": 1.5}, r"top_p is 1.5 but must lie in \(0, 1\]"),
        ({"top_p": 0}, r"top_p is 0.0 but must lie in \(0, 1\]"),
        ({"top_p": True}, "top_p is True but must be a number"),
        ({"top_k": -2}, "top_k is -2 but must be from -1 to"),
        ({"top_k": 1.5}, "top_k is 1.5 but must be a whole number"),
        ({"min_p": 1.01}, r"min_p is 1.01 but must lie in \[0, 1\]"),
        ({"repetition_penalty": 0}, r"repetition_penalty is 0.0 but must lie in \[0.01, 100\]"),
        ({"repetition_penalty": None}, "repetition_penalty is None but must be a number"),
        ({"stop": ""}, "empty text"),
        ({"stop": ["a", ""]}, "empty text"),
        ({"stop": ["a", 3]}, r"stop is \['a', 3\] but must be a text or a list of texts"),
        ({"stop": None}, "stop is None but must be a text"),
        ({"stop_token_ids": [3, -1]}, r"stop_token_ids\[1\] is -1 but must be from 0 to"),
        ({"stop_token_ids": [True]}, r"stop_token_ids\[0\] is True"),
        ({"stop_token_ids": 7}, "stop_token_ids is 7 but must be a list"),
        ({"seed": 2**63}, "seed is 9223372036854775808 but must be from"),
        ({"seed": 1.5}, "seed is 1.5 but must be a whole number"),
        ({"logprobs": 21}, "logprobs is 21 but must be from 0 to 20"),
        ({"logprobs": True}, "logprobs is True but must be a whole number"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21 but must be from 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1 but must be from 0 to 20"),
        ({"ignore_eos": 1}, "ignore_eos is 1 but must be true or false"),
        ({"max_token": 5, "n": 2}, r"unknown sampling params \['max_token', 'n'\]; known are"),
    ],
)
def test_refuses_with_the_operands_and_the_rule(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams.from_dict(values)


def test_refuses_what_is_no_object() -> None:
    with pytest.raises(RequestError, match="must be an object"):
        SamplingParams.from_dict([("top_p", 1.0)])  # type: ignore[arg-type]


def test_accepts_what_json_and_users_write() -> None:
    params = SamplingParams.from_dict(
        {"temperature": 1, "top_p": 1, "top_k": -1, "stop": "\n", "stop_token_ids": [2, 3]}
    )
    assert params == SamplingParams(stop=("\n",), stop_token_ids=(2, 3))
    assert isinstance(params.temperature, float)
    assert SamplingParams.from_dict({"stop": ["a", "b"]}).stop == ("a", "b")
    assert SamplingParams.from_dict({"max_tokens": 0}).max_tokens == 0


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-9, True), (0.01, False)])
def test_temperature_zero_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_the_wire_form_reads_back_equal() -> None:
    params = SamplingParams(
        max_tokens=7,
        temperature=0.3,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        stop=("a", "é\n"),
        stop_token_ids=(1, 2),
        seed=-(2**63),
        logprobs=0,
        ignore_eos=True,
        prompt_logprobs=3,
    )
    assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params
    assert SamplingParams.from_dict({}) == SamplingParams()
