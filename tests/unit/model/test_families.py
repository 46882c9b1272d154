"""Every supported family, computed exactly as transformers computes it; others are refused.

Two steps, so that a failure says which of the two is wrong: the reference against transformers, and
one rank with its folded weights and its KV cache against the reference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    BYPASSES,
    TOLERANCE,
    LocalModel,
    TinyModelFactory,
    assert_near,
    ends_of,
    random_tokens,
    relative_difference,
    tiny_config,
)
from transformers import AutoConfig, GenerationConfig

from cqil_dist.assignment import assign
from cqil_dist.errors import ModelError, UnsupportedModel
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.footprint import footprint
from cqil_dist.model.precision import Precision
from cqil_dist.model.reference import ReferenceModel
from cqil_dist.plan import Plan

TOKENS = 25
# Prefill in uneven chunks, a chunk of one token among them, then decoding.
CUTS = (5, 1, 9, 4, 1, 1, 1, 1, 1, 1)


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 1.9], "long_factor": [1.0, 1.5, 2.5, 4.0]}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("llama", {"head_dim": 12}),
    "llama_no_gqa": ("llama", {"num_key_value_heads": 6}),
    "llama_single_kv_head": ("llama", {"num_key_value_heads": 1}),
    "llama_large_eps": ("llama", {"rms_norm_eps": 0.1}),
    "llama_linear": ("llama", rope("linear", factor=3.0)),
    "llama_llama3": (
        "llama",
        rope("llama3", original_max_position_embeddings=16, **LLAMA3),
    ),
    "llama_yarn": ("llama", rope("yarn", factor=8.0, original_max_position_embeddings=16)),
    "llama_dynamic": ("llama", rope("dynamic", factor=2.0)),
    "llama_longrope": (
        "llama",
        rope("longrope", factor=4.0, original_max_position_embeddings=32, **LONGROPE),
    ),
    "mistral": ("mistral", {}),
    "mistral_window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    # Layers 3 to 5 see the last 6 positions only: layers of one concurrent group differ.
    "qwen2_windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
    ),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_biases_windows": (
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Any:
    family, changes = CONFIGS[request.param]
    return tiny_config(family, **changes)


def test_the_reference_is_transformers_when_sequential(
    config: Any, tiny_model: TinyModelFactory
) -> None:
    model = tiny_model(config)
    tokens = random_tokens(TOKENS)
    logits = model.reference_logits(model.plan("sequential"), tokens)
    assert_near(logits, model.original_logits(tokens))


@pytest.mark.parametrize(
    "plan",
    [
        "sequential",
        "P2 S1 E5 D1",
        "P4 S1 E5 D0",
        "P4 S1 E5 D2",
        "P5 S0 E5 Dfull",
        "P3 S0 E6 Dparallel",
    ],
)
def test_one_rank_with_a_cache_is_the_reference(
    config: Any, plan: str, tiny_model: TinyModelFactory
) -> None:
    model = tiny_model(config)
    tokens = random_tokens(TOKENS)
    expected = model.reference_logits(model.plan(plan), tokens)[ends_of(CUTS)]
    given = LocalModel(model, model.plan(plan)).logits(tokens, CUTS)
    assert_near(given, expected)


@pytest.mark.parametrize("bypass", BYPASSES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bypasses_are_different_models(
    family: str, bypass: str, tiny_model: TinyModelFactory
) -> None:
    """A bypass that did nothing would pass every comparison above."""
    model = tiny_model(tiny_config(family))
    tokens = random_tokens(TOKENS)
    logits = model.reference_logits(model.plan(f"P3 S1 E4 D{bypass}"), tokens)
    others = [model.plan("sequential")]
    others += [model.plan(f"P3 S1 E4 D{other}") for other in BYPASSES if other != bypass]
    for other in others:
        assert relative_difference(logits, model.reference_logits(other, tokens)) > 100 * TOLERANCE


def test_greedy_reference_continues_as_transformers(tiny_model: TinyModelFactory) -> None:
    model = tiny_model()
    prompt = random_tokens(6)
    sequential = ReferenceModel(model.config, model.checkpoint, model.plan("sequential"))
    output = model.original.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    assert sequential.greedy(prompt, 16) == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_half_precision_runs_and_stays_near_float32(
    family: str, dtype: torch.dtype, tiny_model: TinyModelFactory
) -> None:
    model = tiny_model(tiny_config(family, num_hidden_layers=3))
    plan = model.plan("P2 S1 E3 D1")
    tokens = random_tokens(TOKENS)
    expected = model.reference_logits(plan, tokens)[ends_of(CUTS)]
    given = LocalModel(model, plan, dtype=dtype).logits(tokens, CUTS)
    assert given.dtype is torch.float32
    # Rounding to 11 and 8 bits, several times over; an error in a part is ten times as large.
    assert_near(given, expected, 0.01 if dtype is torch.float16 else 0.08)


@pytest.mark.parametrize("saved_as", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_computed_in_float32(
    saved_as: torch.dtype, tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    path = tmp_path / "half"
    original = tiny_model().original.to(saved_as)
    original.save_pretrained(path)
    original.float()  # back, with the rounded weights; the fixture's files have the exact ones
    try:
        model = type(tiny_model())(path)
        assert model.config.checkpoint_dtype == str(saved_as).removeprefix("torch.")
        tokens = random_tokens(TOKENS)
        given = LocalModel(model, model.plan("sequential")).logits(tokens, CUTS)
        expected = model.original_logits(tokens)[ends_of(CUTS)]
        assert_near(given, expected)
    finally:
        del tiny_model().__dict__["original"]


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gemma2": (
        {"model_type": "gemma2"},
        ["model_type 'gemma2'", "capped attention logits (attn_logit_softcapping=50.0)"],
    ),
    "gemma3": ({"model_type": "gemma3_text"}, ["model_type 'gemma3_text'"]),
    "gpt2": ({"model_type": "gpt2"}, ["model_type 'gpt2'", "layer_norm_epsilon=1e-05"]),
    "mixtral": (
        {"model_type": "mixtral"},
        ["model_type 'mixtral'", "mixture of experts (num_local_experts=8)"],
    ),
    "qwen3_moe": ({"model_type": "qwen3_moe"}, ["model_type 'qwen3_moe'", "mixture of experts"]),
    "deepseek": ({"model_type": "deepseek_v3"}, ["model_type 'deepseek_v3'", "latent attention"]),
    "granite": ({"model_type": "granite"}, ["model_type 'granite'"]),
    "cohere": ({"model_type": "cohere"}, ["model_type 'cohere'"]),
    "phi3": ({"model_type": "phi3"}, ["model_type 'phi3'"]),
    "t5": ({"model_type": "t5"}, ["model_type 't5'"]),
    "gelu": (
        {"model_type": "llama", "hidden_act": "gelu"},
        ["this model has activation 'gelu' in place of 'silu'"],
    ),
    "quantised": (
        {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}},
        ["quantised weights"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_structures_are_refused_by_what_differs(name: str, tmp_path: Path) -> None:
    fields, expected = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(UnsupportedModel) as refusal:
        ModelConfig.from_directory(tmp_path)
    for words in [*expected, "Supported are the families llama, mistral, qwen2, qwen3"]:
        assert words in str(refusal.value)
    assert "None" not in str(refusal.value), "a difference that the model does not have"


@pytest.mark.parametrize("content", [None, "{", json.dumps({"model_type": "no such"}), "[]"])
def test_a_config_that_cannot_be_read_is_an_error_about_the_model(
    content: str | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=str(tmp_path)):
        ModelConfig.from_directory(tmp_path)


def test_longrope_is_exact_up_to_its_trained_length_only() -> None:
    config = tiny_config("llama", **CONFIGS["llama_longrope"][1])
    assert ModelConfig.from_hf(config).max_positions == 32
    assert ModelConfig.from_hf(tiny_config()).max_positions == 128


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "expected"),
    [(5, None, (5,)), (5, 7, (7,)), (5, [7, 9], (7, 9)), (5, 0, (0,)), (0, None, (0,))],
)
def test_end_tokens_are_those_that_transformers_generates_with(
    in_config: int,
    in_generation_config: int | list[int] | None,
    expected: tuple[int, ...],
    tmp_path: Path,
) -> None:
    tiny_config(eos_token_id=in_config).save_pretrained(tmp_path)
    if in_generation_config is not None:
        GenerationConfig(eos_token_id=in_generation_config).save_pretrained(tmp_path)
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_layer_size_is_what_the_checkpoint_holds(family: str, tiny_model: TinyModelFactory) -> None:
    """Memory is planned with it. The gains of the input norms are folded into what follows."""
    changes = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = tiny_model(tiny_config(family, **changes))
    layer = model.original.model.layers[0]
    stored = sum(p.numel() for name, p in layer.named_parameters() if "layernorm" not in name)
    config = model.config
    if config.qk_norm:  # kept for every head, so that several layers' heads go through at once
        stored += (config.num_heads + config.num_kv_heads - 2) * config.head_dim
    expected = config.num_layers * stored + config.vocab_size * config.hidden_size
    one_rank = assign(model.plan("sequential"), 1, config.shape)
    told = footprint([one_rank], 0, config, Precision.of("bfloat16"))
    assert told.weight_bytes == 2 * expected


def test_a_config_read_from_files_is_the_config_itself(tiny_model: TinyModelFactory) -> None:
    model = tiny_model()
    assert ModelConfig.from_hf(AutoConfig.from_pretrained(model.path)) == model.config
    assert Plan.sequential(model.config.num_layers) == model.plan("sequential")
