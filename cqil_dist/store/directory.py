"""A check that a directory holds a model in Hugging Face's layout.

This module knows the files' names and how they refer to each other, and reads no weights. Whether
the runtime computes the model's structure is checked by `model/config.py`, and whether every tensor
is there and well shaped by `model/checkpoint.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cqil_dist.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
# Any one of these sets of files is a tokenizer that transformers can load.
_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def check_directory(path: Path) -> None:
    """Raise CheckpointError, with the way out, if `path` is not a complete model directory.

    A complete one has config.json; a *.safetensors file, or model.safetensors.index.json and every
    shard that it names; and a tokenizer.
    """
    _check_config(path)
    _check_weights(path)
    if not any(all((path / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{path} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with "
            "merges.txt); copy it from where the model came from"
        )


def _check_config(path: Path) -> None:
    if not (path / "config.json").is_file():
        ggufs = sorted(found.name for found in path.glob("*.gguf"))
        way_out = (
            f"it holds {', '.join(ggufs)}: name that file itself"
            if ggufs
            else "name the directory that config.json, the *.safetensors files and the tokenizer "
            "are in"
        )
        raise CheckpointError(
            f"{path} has no config.json, so it is not a model directory; {way_out}"
        )
    _read_object(path / "config.json")


def _check_weights(path: Path) -> None:
    if (path / INDEX_NAME).is_file():
        shards = _read_object(path / INDEX_NAME).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(
                f"{path / INDEX_NAME} has no 'weight_map' of tensor names to shard files; copy it "
                "again from where the model came from"
            )
        if missing := sorted(name for name in set(shards.values()) if not (path / name).is_file()):
            raise CheckpointError(
                f"{path} lacks {', '.join(missing)}, which {INDEX_NAME} names; copy every shard "
                "from where the model came from"
            )
    elif not any(path.glob("*.safetensors")):
        if any(path.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{path} has its weights in pytorch_model*.bin (pickle), but only safetensors is "
                'read; convert once with: python -c "from transformers import AutoModelForCausalLM '
                f"as M; M.from_pretrained('{path}').save_pretrained('{path}')\""
            )
        raise CheckpointError(
            f"{path} has no weights: no *.safetensors file is in it; copy them from where the "
            "model came from"
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        decoded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise CheckpointError(f"{path} holds a JSON {type(decoded).__name__}, not an object")
    return decoded
