"""A transformers model under a plan computes what the reference model computes under it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import TinyModelFactory, assert_near, random_tokens, tiny_config
from safetensors.torch import load_file, save_file

from cqil_dist.errors import CheckpointError, PlanError
from cqil_dist.plan import Group, Plan
from cqil_dist.planning.measure.grouped_model import grouped, load_model

CPU = torch.device("cpu")
MIXED = [{"layers": [0, 1], "bypass": 0}, {"layers": [2, 3, 4], "bypass": 1}]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("plan", ["sequential", "P2 S0 E6 Dfull", "P3 S1 E6 Dparallel", MIXED])
def test_logits_are_the_references(
    tiny_model: TinyModelFactory, family: str, plan: str | list[object]
) -> None:
    tiny = tiny_model(tiny_config(family))
    parsed = Plan.parse(plan, 6)
    tokens = [random_tokens(17, seed) for seed in (0, 1)]
    model = load_model(tiny.path, torch.float32, CPU)
    with torch.inference_mode(), grouped(model, parsed.groups):
        logits = model(torch.tensor(tokens)).logits
    for given, token_ids in zip(logits, tokens, strict=True):
        assert_near(given, tiny.reference_logits(parsed, token_ids))


def test_members_keep_their_own_windows(tiny_model: TinyModelFactory) -> None:
    """One of the three layers in a group attends to the last four tokens alone."""
    windows = {"use_sliding_window": True, "sliding_window": 4}
    kinds = ["full_attention", "sliding_attention", *["full_attention"] * 4]
    tiny = tiny_model(tiny_config("qwen2", layer_types=kinds, **windows))
    plan = tiny.plan("P3 S0 E6 D1")
    tokens = random_tokens(20)
    model = load_model(tiny.path, torch.float32, CPU)
    with torch.inference_mode(), grouped(model, plan.groups):
        assert_near(model(torch.tensor([tokens])).logits[0], tiny.reference_logits(plan, tokens))


def test_generating_with_a_cache_is_the_reference(tiny_model: TinyModelFactory) -> None:
    tiny = tiny_model()
    plan = tiny.plan("P2 S0 E6 D1")
    prompt = random_tokens(9)
    model = load_model(tiny.path, torch.float32, CPU)
    with torch.inference_mode(), grouped(model, plan.groups):
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
        )[0].tolist()
    logits = tiny.reference_logits(plan, tokens)
    assert tokens[len(prompt) :] == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_the_model_is_itself_again_afterwards(tiny_model: TinyModelFactory) -> None:
    tiny = tiny_model()
    tokens = random_tokens(9)
    model = load_model(tiny.path, torch.float32, CPU)
    names = list(dict(model.named_parameters()))
    with pytest.raises(ZeroDivisionError), grouped(model, tiny.plan("P6 S0 E6 D0").groups):
        1 / 0  # noqa: B018
    assert list(dict(model.named_parameters())) == names
    with torch.inference_mode():
        assert_near(model(torch.tensor([tokens])).logits[0], tiny.original_logits(tokens))


def test_checkpointing_computes_groups_twice_and_changes_no_gradient(
    tiny_model: TinyModelFactory,
) -> None:
    tiny = tiny_model()
    tokens = torch.tensor([random_tokens(9)])
    gradients = []
    for checkpointing in (False, True):
        model = load_model(tiny.path, torch.float32, CPU)
        computed = count_calls(model.get_decoder().layers[1].mlp)
        with grouped(model, tiny.plan("P3 S0 E6 D1").groups, checkpointing=checkpointing):
            model(tokens).logits.logsumexp(-1).sum().backward()
        assert len(computed) == 1 + checkpointing
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient)


def count_calls(module: torch.nn.Module) -> list[int]:
    """A list that grows by an element with each call of a module."""
    calls: list[int] = []
    module.register_forward_hook(lambda *args: calls.append(1))
    return calls


def test_an_incomplete_checkpoint_is_refused(tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    """transformers would fill a missing tensor with random values."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_model().path, copy)
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(copy, torch.float32, CPU)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        load_model(copy, torch.float32, CPU)


def test_a_layer_that_is_not_there_is_named(tiny_model: TinyModelFactory) -> None:
    model = load_model(tiny_model().path, torch.float32, CPU)
    with (
        pytest.raises(PlanError, match="layer 6 but the model has 6 layers"),
        grouped(model, [Group((5, 6))]),
    ):
        raise AssertionError("it began")
