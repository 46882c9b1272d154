"""The format of a frame on a connection: two lengths, a msgpack header, and a tensor's raw bytes.

    u32 header length | u32 payload length | header | payload        (little-endian throughout)

Nothing is pickled, so no bytes that a peer sends can run code here. This module knows bytes and
tensors; it knows nothing of sockets, of ranks, or of what a header means.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import msgpack
import torch
from torch import Tensor

from cqil_dist.errors import ExchangeError, ProtocolError

PREFIX = struct.Struct("<II")
MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 2**32 - 1
MAX_DIMS = 8

# The codes of dtypes on the wire. A code is never reused for another dtype.
_DTYPES = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16, 3: torch.int64}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def dtype_code(dtype: torch.dtype) -> int:
    """Return a dtype's code on the wire. Raises ExchangeError for one that frames do not carry."""
    if dtype not in _CODES:
        carried = ", ".join(str(known) for known in _CODES)
        raise ExchangeError(f"frames do not carry {dtype}; convert the tensor to one of {carried}")
    return _CODES[dtype]


def dtype_from_code(code: object) -> torch.dtype:
    """Return the dtype of a code on the wire. Raises ProtocolError for an unknown code."""
    if type(code) is not int or code not in _DTYPES:
        raise ProtocolError(f"dtype code {code!r} is unknown; known codes: {sorted(_DTYPES)}")
    return _DTYPES[code]


def encode_head(
    header: object, payload_bytes: int = 0, max_payload_bytes: int = MAX_PAYLOAD_BYTES
) -> bytes:
    """Encode the part of a frame that precedes its payload.

    Args:
        header: any value that msgpack encodes.
        payload_bytes: length of the payload that follows.
        max_payload_bytes: the bound on payloads that the receiver will apply.

    Raises:
        ExchangeError: the header or the payload is over its bound.
    """
    encoded: bytes = msgpack.packb(header)
    if len(encoded) > MAX_HEADER_BYTES:
        raise ExchangeError(
            f"a frame header of {len(encoded)} bytes is over the bound of {MAX_HEADER_BYTES}; "
            "send what is large as the payload"
        )
    if payload_bytes > min(max_payload_bytes, MAX_PAYLOAD_BYTES):
        raise ExchangeError(
            f"a payload of {payload_bytes} bytes is over the connection's bound of "
            f"{min(max_payload_bytes, MAX_PAYLOAD_BYTES)}; raise the bound on both ends or send "
            "fewer tokens at a time"
        )
    return PREFIX.pack(len(encoded), payload_bytes) + encoded


def decode_prefix(
    data: bytes | bytearray | memoryview, max_payload_bytes: int = MAX_PAYLOAD_BYTES
) -> tuple[int, int]:
    """Decode the lengths of a frame's header and payload from the first 8 bytes of the frame.

    Raises:
        ProtocolError: there are fewer than 8 bytes, or a length is over its bound.
    """
    if len(data) < PREFIX.size:
        raise ProtocolError(f"a frame starts with {PREFIX.size} bytes of lengths, not {len(data)}")
    header_bytes, payload_bytes = PREFIX.unpack_from(data)
    if header_bytes > MAX_HEADER_BYTES:
        raise ProtocolError(
            f"a frame claims a header of {header_bytes} bytes; the bound is {MAX_HEADER_BYTES}"
        )
    if payload_bytes > max_payload_bytes:
        raise ProtocolError(
            f"a frame claims a payload of {payload_bytes} bytes; the bound is {max_payload_bytes}"
        )
    return header_bytes, payload_bytes


def decode_header(data: bytes | bytearray | memoryview) -> Any:
    """Decode the header in these bytes: plain values, lists, and dicts with string keys.

    Raises:
        ProtocolError: the bytes are not exactly one msgpack value, or it has an extension type.
    """
    try:
        # Lengths inside the header are bounded by len(data), and its nesting by msgpack itself.
        return msgpack.unpackb(data, raw=False, strict_map_key=True, ext_hook=_refuse_extension)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"a frame header is not valid msgpack: {error!r}") from error


def _refuse_extension(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code} of {len(data)} bytes")


def describe_tensor(tensor: Tensor) -> list[int]:
    """Return the header entry [dtype code, *shape] of a tensor, which `decode_tensor_entry` reads.

    Raises:
        ExchangeError: frames do not carry the tensor's dtype, or so many dimensions.
    """
    if tensor.dim() > MAX_DIMS:
        raise ExchangeError(f"frames carry tensors of {MAX_DIMS} dimensions, not {tensor.dim()}")
    return [dtype_code(tensor.dtype), *tensor.shape]


def decode_tensor_entry(entry: object, payload_bytes: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """Decode the dtype and shape of a payload from its header entry [dtype code, *shape].

    Raises:
        ProtocolError: the entry is malformed, or does not describe `payload_bytes` bytes.
    """
    if not isinstance(entry, list) or not 1 <= len(entry) <= 1 + MAX_DIMS:
        raise ProtocolError(
            f"a frame describes its payload as {entry!r}; expected [dtype code, *shape] with "
            f"{MAX_DIMS} dimensions at most"
        )
    dtype, shape = dtype_from_code(entry[0]), tuple(entry[1:])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ProtocolError(f"a frame describes a payload of shape {shape!r}; sizes are >= 0")
    described = math.prod(shape) * dtype.itemsize
    if described != payload_bytes:
        raise ProtocolError(
            f"a frame describes a payload of shape {shape} and {dtype}, {described} bytes, but "
            f"carries {payload_bytes} bytes"
        )
    return dtype, shape


def memory_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor without grad, as writable bytes, not a copy."""
    if not tensor.numel():
        return memoryview(bytearray())  # an array without elements cannot be cast
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)  # numpy has no bfloat16
    return tensor.numpy().data.cast("B")
