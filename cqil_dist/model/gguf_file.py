"""GGUF files as they lie on disk, read through the `gguf` package and without transformers."""

from __future__ import annotations

from pathlib import Path

from cqil_dist.errors import CheckpointError

_MAGIC = b"GGUF"


def check_magic(gguf: Path) -> None:
    """Raise CheckpointError if a file does not begin as a GGUF file does."""
    with gguf.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(
                f"{gguf} does not start with {_MAGIC.decode()!r}, so it is not a GGUF file; name a "
                "GGUF file, or a directory with config.json and safetensors"
            )


def float32_bytes(gguf: Path) -> int:
    """Count the bytes that a GGUF file's weights take in float32.

    Raises:
        CheckpointError: the file is damaged, or ends too early.
    """
    from gguf import GGUFReader  # imports numpy

    try:
        tensors = GGUFReader(gguf).tensors
    except (ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{gguf} is damaged or cut short ({error}); copy it again from where it came from"
        ) from error
    return sum(int(tensor.n_elements) for tensor in tensors) * 4
