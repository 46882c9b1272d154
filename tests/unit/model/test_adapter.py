"""Adapters are merged as peft merges them, whole or in a rank's parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import random_adapter
from helpers.tiny_models import (
    LocalModel,
    TinyModel,
    TinyModelFactory,
    assert_near,
    ends_of,
    random_tokens,
    tiny_config,
)
from safetensors.torch import load_file, save_file

from cqil_dist.errors import CheckpointError, CqilError, PlanError, UnsupportedModel
from cqil_dist.model.adapter import Adapter
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.reference import ReferenceModel

TOKENS = random_tokens(12)


@pytest.fixture(scope="module")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


@pytest.fixture
def adapter(model: TinyModel, tmp_path: Path) -> Path:
    return random_adapter(tmp_path / "adapter", model)


def of_peft(model: TinyModel, **settings: Any) -> Any:
    """peft's model with random factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    torch.manual_seed(0)
    wrapped: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    return wrapped.eval()


@torch.inference_mode()
def logits_of(wrapped: Any) -> torch.Tensor:
    logits: torch.Tensor = wrapped(torch.tensor([TOKENS])).logits[0]
    return logits


def reference(model: TinyModel, adapter: Path, plan: str = "sequential") -> ReferenceModel:
    adapted = Checkpoint(model.path, Adapter(adapter))
    return ReferenceModel(model.config, adapted, model.plan(plan))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "target_modules": "all-linear", "use_rslora": True},
        {
            "r": 4,
            "target_modules": ["o_proj", "up_proj"],
            "rank_pattern": {"layers.2.self_attn.o_proj": 2},
            "alpha_pattern": {"up_proj": 3},
        },
    ],
)
def test_pefts_adapters_give_pefts_logits(
    model: TinyModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    wrapped = of_peft(model, **settings)
    wrapped.save_pretrained(str(tmp_path))
    assert_near(reference(model, tmp_path).logits(TOKENS), logits_of(wrapped))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_peft_reads_what_we_write(
    tiny_model: TinyModelFactory, tmp_path: Path, family: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = tiny_model(tiny_config(family))
    adapter = random_adapter(tmp_path, model)
    base = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, str(adapter)).eval()
    found = logits_of(wrapped)
    assert_near(reference(model, adapter).logits(TOKENS), found)
    with pytest.raises(AssertionError):
        assert_near(found, model.original_logits(TOKENS), 0.05)


def test_ranks_merge_their_own_parts(model: TinyModel, adapter: Path) -> None:
    """And the plan to compare with runs the weights as they are."""
    plan, other = model.plan("P2 S0 E6 D1"), model.plan("sequential")
    adapted = Checkpoint(model.path, Adapter(adapter))
    local = LocalModel(model, plan, compare=other, checkpoints=[adapted, model.checkpoint])
    cuts = [5, 4, 1, 1, 1]
    expected = reference(model, adapter, "P2 S0 E6 D1").logits(TOKENS)
    assert_near(local.logits(TOKENS, cuts), expected[ends_of(cuts)])
    assert_near(local.logits(TOKENS, cuts, plan=1), model.original_logits(TOKENS)[ends_of(cuts)])


def test_parts_are_parts_of_the_whole(model: TinyModel, adapter: Path) -> None:
    name = "model.layers.2.mlp.gate_proj.weight"
    with Checkpoint(model.path, Adapter(adapter)).open() as reader:
        whole = reader.read(name, (41, 48))
        torch.testing.assert_close(reader.read(name, (41, 48), rows=range(7, 20)), whole[7:20])
        torch.testing.assert_close(reader.read(name, (41, 48), columns=range(3, 9)), whole[:, 3:9])


def test_the_plan_is_inside(model: TinyModel, adapter: Path) -> None:
    assert model.plan("P2 S0 E6 D1").to_json() == Adapter(adapter).plan
    (adapter / "plan.json").unlink()
    assert Adapter(adapter).plan is None


def test_an_adapter_for_another_plan_is_refused(model: TinyModel, adapter: Path) -> None:
    Adapter(adapter).check_plan(model.plan("P2 S0 E6 D1"))
    with pytest.raises(PlanError, match=r"was made for 3 groups .*, not for sequential; give --pl"):
        Adapter(adapter).check_plan(model.plan("sequential"))


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        save_file({name.replace(old, new): t for name, t in load_file(file).items()}, file)

    return change


def cut_tensor(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, file)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda path: (path / "adapter_config.json").unlink(), CheckpointError, "is it the dir"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), CheckpointError, "is it the"),
        (
            lambda path: (path / "adapter_model.safetensors").write_bytes(b"12345678"),
            CheckpointError,
            "truncated or damaged",
        ),
        (change_config(peft_type="IA3"), UnsupportedModel, "of type IA3"),
        (change_config(use_dora=True), UnsupportedModel, "use_dora = True"),
        (change_config(init_lora_weights="pissa"), UnsupportedModel, "changes the base model too"),
        (change_config(bias="all"), UnsupportedModel, "bias = 'all'"),
        (rename("layers.5", "layers.6"), CheckpointError, "of this model of 6 layers"),
        (rename("up_proj.lora_A", "up_proj.lora_E"), UnsupportedModel, "not a LoRA factor"),
        (cut_tensor, CheckpointError, r"by \[41, 3\] x \[3, 47\] but .* is \[41, 48\]"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    model: TinyModel,
    adapter: Path,
    change: Callable[[Path], None],
    kind: type[CqilError],
    message: str,
) -> None:
    change(adapter)
    with pytest.raises(kind, match=message):
        Adapter(adapter).check(model.config)
