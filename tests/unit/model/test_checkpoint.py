"""Damaged checkpoints are reported by tensor and file, and nobody reads what it does not need."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import (
    CPU,
    LocalModel,
    TinyModel,
    TinyModelFactory,
    assert_near,
    ends_of,
    random_tokens,
    tiny_config,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from cqil_dist.assignment import assign
from cqil_dist.errors import CheckpointError
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.head import Embedding
from cqil_dist.model.precision import Precision, parse_dtype
from cqil_dist.model.reference import ReferenceModel
from cqil_dist.rank.program import CacheShape, RankProgram

INDEX = "model.safetensors.index.json"
Weights = dict[str, Tensor]


@pytest.fixture
def copy(tiny_model: TinyModelFactory, tmp_path: Path) -> Path:
    """This test's own copy of a model of one file."""
    path = tmp_path / "model"
    shutil.copytree(tiny_model().path, path)
    return path


@pytest.fixture
def sharded(tiny_model: TinyModelFactory, tmp_path: Path) -> Path:
    """This test's own copy of a model of several files."""
    path = tmp_path / "sharded"
    shutil.copytree(tiny_model(max_shard_size="100KB").path, path)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def rewrite(path: Path, change: Callable[[Weights], Weights]) -> None:
    """Write the weights that `change` makes of a one-file model's."""
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file)


def remove(path: Path, name: str) -> None:
    rewrite(path, lambda weights: {n: w for n, w in weights.items() if n != name})


def replace(path: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    rewrite(path, lambda weights: {**weights, name: change(weights[name])})


def load_rank(path: Path, rank: int = 0, world: int = 1, plan: str = "sequential") -> RankProgram:
    model = TinyModel(path)
    assignment = assign(model.plan(plan), world, model.config.shape)
    shape = CacheShape(1, 8)
    return RankProgram(
        rank, [assignment], model.config, [model.checkpoint], shape, Precision.of("float32"), CPU
    )


def load_reference(path: Path) -> ReferenceModel:
    model = TinyModel(path)
    return ReferenceModel(model.config, model.checkpoint, model.plan("sequential"))


LOADERS = pytest.mark.parametrize("load", [load_rank, load_reference])


@LOADERS
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.k_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.5.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(copy: Path, name: str, load: Callable[[Path], object]) -> None:
    remove(copy, name)
    with pytest.raises(CheckpointError) as error:
        load(copy)
    assert f"tensor {name} is missing" in str(error.value)
    assert str(copy) in str(error.value)


@LOADERS
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (40, 48), "[48, 48]"),
        ("model.layers.1.self_attn.v_proj.weight", (48, 24), "[24, 48]"),
        ("model.layers.2.mlp.gate_proj.weight", (48, 41), "[41, 48]"),
        ("model.layers.2.post_attention_layernorm.weight", (1,), "[48]"),
        ("lm_head.weight", (306, 48), "[307, 48]"),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    copy: Path,
    name: str,
    shape: tuple[int, ...],
    expected: str,
    load: Callable[[Path], object],
) -> None:
    replace(copy, name, lambda _: torch.zeros(shape))
    with pytest.raises(CheckpointError) as error:
        load(copy)
    message = str(error.value)
    assert f"tensor {name} in {copy / 'model.safetensors'} has shape {list(shape)}" in message
    assert expected in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32])
def test_weights_that_are_not_plain_numbers_are_refused(copy: Path, dtype: torch.dtype) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    replace(copy, name, lambda weight: weight.to(dtype))
    with pytest.raises(CheckpointError) as error:
        load_rank(copy)
    assert name in str(error.value)
    assert str(dtype) in str(error.value)


def test_a_missing_bias_is_named(tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_model(tiny_config("qwen2")).path, path)
    name = "model.layers.3.self_attn.k_proj.bias"
    remove(path, name)
    with pytest.raises(CheckpointError, match=name):
        load_rank(path)


def test_missing_embeddings_are_named(copy: Path) -> None:
    remove(copy, "model.embed_tokens.weight")
    model = TinyModel(copy)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is missing"):
        Embedding(model.config, model.checkpoint, torch.float32)


@pytest.mark.parametrize("size", [0, 4, 5000, -1])
def test_a_truncated_file_is_named(copy: Path, size: int) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(CheckpointError) as error:
        load_rank(copy)
    assert str(file) in str(error.value)


def test_a_truncated_shard_is_named_with_the_tensor_it_was_needed_for(sharded: Path) -> None:
    name = "model.layers.4.mlp.up_proj.weight"
    file = sharded / json.loads((sharded / INDEX).read_text())["weight_map"][name]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as error:
        load_rank(sharded)
    assert str(file) in str(error.value)
    assert "tensor model.layers." in str(error.value)


def test_sharded_and_whole_checkpoints_are_the_same_model(
    tiny_model: TinyModelFactory, sharded: Path
) -> None:
    whole, tokens, cuts = tiny_model(), random_tokens(9), (6, 2, 1)
    model = TinyModel(sharded)
    given = LocalModel(model, model.plan("P2 S1 E5 D1")).logits(tokens, cuts)
    expected = whole.reference_logits(whole.plan("P2 S1 E5 D1"), tokens)[ends_of(cuts)]
    assert_near(given, expected)


def test_an_index_that_names_an_absent_shard_is_refused_by_both_names(sharded: Path) -> None:
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(CheckpointError) as error:
        Checkpoint(sharded)
    assert missing.name in str(error.value)
    assert INDEX in str(error.value)


def test_an_index_that_promises_a_tensor_its_shard_lacks_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name = "model.layers.2.self_attn.o_proj.weight"
    others = sorted(set(index["weight_map"].values()) - {index["weight_map"][name]})
    index["weight_map"][name] = others[0]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        load_rank(sharded)
    assert name in str(error.value)
    assert others[0] in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b'{"weight_map": null}', b'{"weight_map": ["a"]}', b"\xff\xfe"],
)
def test_an_index_that_is_none_is_refused_by_its_name(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        Checkpoint(sharded)
    assert str(sharded / INDEX) in str(error.value)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        Checkpoint(tmp_path)
    assert f"no .safetensors file in {tmp_path}" in str(error.value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_needs_the_tensors_of_its_own_layers_only(
    family: str, rank: int, tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    """So a node may hold, and has to read, only its part of a large model."""
    path = tmp_path / "model"
    shutil.copytree(tiny_model(tiny_config(family)).path, path)
    plan, world = "P3 S1 E5 D1", 3
    model = TinyModel(path)
    assignment = assign(model.plan(plan), world, model.config.shape)
    layers = assignment.layers_of(rank)
    assert 0 < len(layers) < model.config.num_layers
    own = (*(f"model.layers.{layer}." for layer in layers), "model.norm.", "lm_head.")
    rewrite(path, lambda weights: {n: w for n, w in weights.items() if n.startswith(own)})
    load_rank(path, rank, world, plan)
    with pytest.raises(CheckpointError, match="is missing"):
        load_rank(path, (rank + 1) % world, world, plan)


def test_memory_is_what_a_rank_s_weights_take(tiny_model: TinyModelFactory) -> None:
    """Gains are folded away; everything else is held once, over all ranks together."""
    path = tiny_model().path
    weights = load_file(path / "model.safetensors")
    expected = sum(
        weight.nbytes
        for name, weight in weights.items()
        if "norm" not in name and "embed_tokens" not in name
    )
    programs = [load_rank(path, rank, 3, "P3 S1 E5 D1") for rank in range(3)]
    assert sum(program.weight_bytes for program in programs) == expected
    cached = 6 * 8 * 2 * 3 * 8 * 4  # layers, tokens, keys and values, heads, head size, bytes
    assert sum(program.kv_bytes for program in programs) == cached


def test_dtypes_are_named() -> None:
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(CheckpointError, match="dtype 'int4' is not one of float32, float16"):
        parse_dtype("int4")
