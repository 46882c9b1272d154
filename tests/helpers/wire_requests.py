"""Random gRPC requests, with any values, and damaged ones."""

from __future__ import annotations

from typing import Any

from helpers.served import MODEL
from helpers.tiny_models import VOCAB
from hypothesis import strategies as st

from cqil_dist.rpc.v1 import generation_pb2 as pb

SOME_REQUESTS = [
    pb.GenerateRequest(
        text="The harbour",
        sampling_params=pb.SamplingParams(max_tokens=5, seed=3, stop=["x"], logprobs=2),
        resume_token_ids=[5, 6],
        request_id="mine",
        model=MODEL,
        timeline=True,
    ),
    pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2, 3]),
        sampling_params=pb.SamplingParams(
            max_tokens=3, temperature=0.5, top_p=0.5, top_k=5, min_p=0.1, repetition_penalty=1.5
        ),
        final_only=True,
        echo=True,
    ),
    pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x")]),
        sampling_params=pb.SamplingParams(stop_token_ids=[3], ignore_eos=True, prompt_logprobs=1),
    ),
]
_int32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 30)
_ids = st.lists(st.integers(0, VOCAB - 1) | _int32, max_size=9)
_numbers = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 2)
_words = st.text(max_size=4)
_any_sampling = st.builds(
    pb.SamplingParams,
    max_tokens=st.none() | _int32,
    temperature=st.none() | _numbers,
    top_p=st.none() | _numbers | st.floats(0, 1, exclude_min=True),
    top_k=st.none() | _int32,
    min_p=st.none() | _numbers | st.floats(0, 1),
    repetition_penalty=st.none() | _numbers,
    stop=st.lists(_words, max_size=2),
    stop_token_ids=st.lists(_int32, max_size=2),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | _int32,
    ignore_eos=st.booleans(),
    prompt_logprobs=st.none() | _int32,
)
_few_sampling = st.builds(
    pb.SamplingParams,
    max_tokens=st.none() | st.integers(0, 9),
    temperature=st.none() | st.floats(0, 1e300),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    repetition_penalty=st.none() | st.floats(0.01, 100),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
_others: dict[str, Any] = {
    "sampling_params": _any_sampling | _few_sampling,
    "final_only": st.booleans(),
    "resume_token_ids": st.just([]) | _ids | st.lists(st.integers(0, VOCAB - 1), max_size=40),
    "request_id": _words,
    "model": st.just("") | st.just(MODEL) | _words,
    "echo": st.booleans(),
    "timeline": st.booleans(),
}
_messages = st.lists(st.builds(pb.ChatMessage, role=_words, content=_words), max_size=2)
ANY_REQUESTS = st.one_of(
    st.builds(pb.GenerateRequest, **_others),
    st.builds(pb.GenerateRequest, text=_words, **_others),
    st.builds(pb.GenerateRequest, token_ids=st.builds(pb.TokenIds, ids=_ids), **_others),
    st.builds(pb.GenerateRequest, chat=st.builds(pb.Chat, messages=_messages), **_others),
)


@st.composite
def damaged_requests(draw: st.DrawFn) -> bytes:
    """A request that is truncated, has flipped bits, or has a part of it doubled."""
    data = bytearray(draw(st.sampled_from(SOME_REQUESTS)).SerializeToString())
    for place in draw(st.lists(st.integers(0, 8 * len(data) - 1), max_size=4)):
        data[place // 8] ^= 1 << place % 8
    begin, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    return bytes(draw(st.sampled_from([data, data[:end], data[:end] + data[begin:]])))
