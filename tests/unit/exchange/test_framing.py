from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cqil_dist.errors import ExchangeError, ProtocolError
from cqil_dist.exchange import framing

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64]

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
headers = st.dictionaries(st.text(), values, max_size=5)


@given(headers, st.integers(0, framing.MAX_PAYLOAD_BYTES))
def test_head_round_trip(header: dict[str, Any], payload_bytes: int) -> None:
    head = framing.encode_head(header, payload_bytes)
    header_bytes, decoded_payload_bytes = framing.decode_prefix(head)
    assert decoded_payload_bytes == payload_bytes
    assert framing.PREFIX.size + header_bytes == len(head)
    assert framing.decode_header(head[framing.PREFIX.size :]) == header


@given(headers, st.integers(0, 4096), st.data())
def test_mutated_heads_raise_only_protocol_errors(
    header: dict[str, Any], payload_bytes: int, data: st.DataObject
) -> None:
    head = bytearray(framing.encode_head(header, payload_bytes))
    for _ in range(data.draw(st.integers(1, 4))):
        head[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    cut = head[: data.draw(st.integers(0, len(head)))]
    try:
        header_bytes, claimed = framing.decode_prefix(cut, 4096)
        assert header_bytes <= framing.MAX_HEADER_BYTES
        assert claimed <= 4096
        decoded = framing.decode_header(cut[8 : 8 + header_bytes])
        framing.decode_tensor_entry(decoded, claimed)
    except ProtocolError:
        pass


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_protocol_errors(data: bytes) -> None:
    for decode in (framing.decode_prefix, framing.decode_header):
        with contextlib.suppress(ProtocolError):
            decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",  # a list that claims 4 billion items
        b"\xdb\xff\xff\xff\xff",  # a string that claims 4 GB
        b"\x91" * 5000,  # 5000 nested lists
        b"\xd4\x05\x00",  # an extension type
        b"\x81\x01\x02",  # a key that is no string
        b"\x01\x02",  # a second value behind the first
        b"",
    ],
)
def test_hostile_headers_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        framing.decode_header(data)


def test_lengths_over_their_bounds_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ProtocolError, match="65537"):
        framing.decode_prefix(framing.PREFIX.pack(framing.MAX_HEADER_BYTES + 1, 0))
    with pytest.raises(ProtocolError, match="bound is 100"):
        framing.decode_prefix(framing.PREFIX.pack(1, 101), 100)
    with pytest.raises(ProtocolError, match="8 bytes"):
        framing.decode_prefix(b"1234567")


def test_a_sender_is_refused_what_its_receiver_would_refuse() -> None:
    with pytest.raises(ExchangeError, match="header"):
        framing.encode_head({"text": "x" * framing.MAX_HEADER_BYTES})
    with pytest.raises(ExchangeError, match="101 bytes"):
        framing.encode_head([], 101, 100)
    with pytest.raises(ExchangeError, match=str(2**32)):
        framing.encode_head([], 2**32, 2**40)


@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), max_size=framing.MAX_DIMS),
    st.integers(0, 2**31),
)
def test_tensor_entry_and_memory_round_trip(
    dtype: torch.dtype, shape: list[int], seed: int
) -> None:
    source = torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    memory = framing.memory_of(source)
    assert memory.nbytes == math.prod(shape) * dtype.itemsize
    decoded = framing.decode_tensor_entry(framing.describe_tensor(source), memory.nbytes)
    assert decoded == (dtype, tuple(shape))
    copy = torch.empty(shape, dtype=dtype)
    framing.memory_of(copy)[:] = memory
    assert torch.equal(copy, source)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        [9, 2],
        [True, 2],
        [0, -1, -2],
        [0, 2.0],
        [0, "2"],
        [0, 3],  # 12 bytes, not 8
        [0] + [1] * 9,
        [0, 2**62, 4],  # overflows 64 bits
    ],
)
def test_malformed_tensor_entries_are_refused(entry: object) -> None:
    with pytest.raises(ProtocolError):
        framing.decode_tensor_entry(entry, 8)


def test_a_dtype_that_frames_do_not_carry_is_named() -> None:
    with pytest.raises(ExchangeError, match=r"torch\.complex64"):
        framing.describe_tensor(torch.zeros(1, dtype=torch.complex64))
