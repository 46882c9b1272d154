"""Distillation lowers a plan's divergence on text that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.planning_cases import HELD_OUT, fitted_loras, fresh, held_out_kl, random_windows
from helpers.tiny_models import TinyModel, assert_near, random_tokens
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from cqil_dist.errors import ConfigError
from cqil_dist.model.adapter import Adapter, write_adapter
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.reference import ReferenceModel
from cqil_dist.plan import Plan
from cqil_dist.planning.measure import held_out as held_out_module
from cqil_dist.planning.measure import kl_loss as kl_loss_module
from cqil_dist.planning.measure.grouped_model import grouped
from cqil_dist.planning.measure.kl_loss import kl_loss
from cqil_dist.planning.measure.merging import merge
from cqil_dist.planning.recover import distillation
from cqil_dist.planning.recover.compensation import Compensation
from cqil_dist.planning.recover.distillation import distill
from cqil_dist.planning.recover.training_config import TrainingConfig
from cqil_dist.planning.recover.training_state import TrainingLog
from cqil_dist.progress import SilentProgress

PLAN = "P2 S0 E6 D0"
CONFIG = TrainingConfig(
    steps=12,
    batch_size=2,
    learning_rate=0.01,
    warmup_steps=2,
    lora_r=8,
    lora_alpha=8,
    save_steps=4,
    eval_steps=6,
)
TRAIN = random_windows(16, 1)


def train(
    tiny: TinyModel,
    output: Path,
    *,
    model: PreTrainedModel | None = None,
    start: Path | None = None,
    on_evaluation: Callable[[TrainingLog], None] = lambda log: None,
    **changes: Any,
) -> TrainingLog:
    return distill(
        model or fresh(tiny),
        tiny.plan(PLAN),
        TRAIN,
        HELD_OUT,
        replace(CONFIG, **changes),
        output,
        SilentProgress(),
        teacher="tiny",
        made={},
        start=None if start is None else Adapter(start),
        on_evaluation=on_evaluation,
    )


def compensated(tiny: TinyModel, model: PreTrainedModel, output: Path) -> Path:
    plan = tiny.plan(PLAN)
    fitting = Compensation(model, random_windows(64, 3), SilentProgress(), rank=16)
    write_adapter(output, fitted_loras(fitting, plan), str(tiny.path), plan.to_json())
    return output


def test_distillation_lowers_the_divergence_of_text_not_trained_on(
    tiny: TinyModel, tmp_path: Path
) -> None:
    log = train(tiny, tmp_path, steps=20)
    before, after = (held_out_kl(tiny, PLAN, each) for each in (None, tmp_path))
    assert log.held_out[0] == pytest.approx(before, abs=1e-4)
    assert log.held_out[20] == pytest.approx(after, abs=1e-4)
    assert after < 0.9 * before
    inside = Adapter(tmp_path).plan
    assert inside is not None
    assert Plan.parse(inside, 6) == tiny.plan(PLAN)
    Adapter(tmp_path).check(tiny.config)


def test_a_resumed_run_is_an_unbroken_one(tiny: TinyModel, tmp_path: Path) -> None:
    """A run that was killed repeats the steps since its last saved state, with equal results."""
    unbroken = train(tiny, tmp_path / "unbroken")

    class Killed(Exception):
        pass

    def kill(log: TrainingLog) -> None:
        if len(log.losses) == 6:
            raise Killed

    with pytest.raises(Killed):
        train(tiny, tmp_path / "broken", on_evaluation=kill)
    resumed = train(tiny, tmp_path / "broken")
    assert resumed.losses == unbroken.losses
    assert resumed.held_out == unbroken.held_out
    weights = [
        load_file(tmp_path / run / "adapter_model.safetensors") for run in ("unbroken", "broken")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert train(tiny, tmp_path / "broken").losses == unbroken.losses, "it is done already"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"something else"])
def test_a_damaged_state_is_named(tiny: TinyModel, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "training.pt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"training\.pt is damaged .* remove .* to begin anew"):
        train(tiny, tmp_path)


def test_what_is_found_with_bfloat16_weights_goes_into_a_float32_adapter(
    tiny: TinyModel, tmp_path: Path
) -> None:
    """A GPU computes in bfloat16 by default, while adapters stay in float32."""
    model = fresh(tiny, torch.bfloat16)
    start = compensated(tiny, model, tmp_path / "start")
    trained = tmp_path / "trained"
    log = train(tiny, trained, model=model, start=start, gradient_checkpointing=True)
    kls = [held_out_kl(tiny, PLAN, each) for each in (None, start, trained)]
    assert kls[2] < 0.98 * kls[1] < 0.9 * kls[0]
    assert log.held_out[0] == pytest.approx(kls[1], rel=0.05), "it is the written adapter's"
    assert log.held_out[12] == pytest.approx(kls[2], rel=0.05)
    written = load_file(trained / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}


def test_float32_weights_take_part_in_the_models_dtype(tiny: TinyModel) -> None:
    """An adapter's products would take longer in float32."""
    student = distillation._Student(fresh(tiny, torch.bfloat16), CONFIG, None)
    lora_a = student.peft_model.get_submodule("base_model.model.model.layers.3.mlp.up_proj.lora_A")
    seen: set[torch.dtype] = set()
    for module in lora_a.modules():
        module.register_forward_hook(
            lambda module, given, y: seen.update({given[0].dtype, y.dtype})
        )
    hidden_CTD = student.hidden(TRAIN.token_ids_WT[:2])
    hidden_CTD.float().square().mean().backward()  # type: ignore[no-untyped-call]
    assert seen == {torch.bfloat16}
    trained = [p for p in student.peft_model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)


def test_windows_are_computed_together_or_one_by_one(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = train(tiny, tmp_path / "together", steps=3)
    monkeypatch.setattr(held_out_module, "_TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(kl_loss_module, "_ROWS_AT_ONCE", 7)
    apart = train(tiny, tmp_path / "apart", steps=3)
    assert apart.losses == pytest.approx(together.losses, abs=1e-5)
    assert apart.held_out == pytest.approx(together.held_out, abs=1e-5)


def test_the_loss_is_the_kl_divergence_and_has_its_gradient(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient equal those that torch derives from all logits at once."""
    monkeypatch.setattr(kl_loss_module, "_ROWS_AT_ONCE", 7)
    model = fresh(tiny)
    shape = (2, 5, model.config.hidden_size)
    teacher_CTD, student_CTD = torch.randn(shape), torch.randn(shape, requires_grad=True)
    loss = kl_loss(model, teacher_CTD, student_CTD)
    (gradient,) = torch.autograd.grad(3 * loss, student_CTD)
    head = model.get_output_embeddings()
    given, said = (head(each).log_softmax(-1) for each in (teacher_CTD.detach(), student_CTD))
    kl = F.kl_div(said, given, log_target=True, reduction="sum") / 10
    (expected,) = torch.autograd.grad(3 * kl, student_CTD)
    assert loss.item() == pytest.approx(kl.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_a_folder_of_another_run_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    train(tiny, tmp_path, steps=3)
    with pytest.raises(ConfigError, match="another lora_r, steps; choose another folder"):
        train(tiny, tmp_path, steps=4, lora_r=4)
    same = train(tiny, tmp_path, steps=3, save_steps=2)
    assert len(same.losses) == 3, "how often it is saved makes no difference"


def test_the_model_is_left_as_it_was(tiny: TinyModel, tmp_path: Path) -> None:
    model = fresh(tiny)
    start = compensated(tiny, model, tmp_path / "start")
    train(tiny, tmp_path / "trained", model=model, start=start, steps=3)
    weights = dict(fresh(tiny).named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0 but must be a whole number, at least 1"),
        ({"warmup_steps": 12}, "warmup_steps is 12 but must be below steps, 12"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0 but must be a finite number, above 0"),
        ({"seed": -1}, "seed is -1 but must be a whole number, from 0 to 4294967296"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


def test_every_epoch_sees_every_window_once() -> None:
    epoch = [index for step in range(8) for index in distillation._indices(16, CONFIG, step)]
    following = [
        index for step in range(8, 16) for index in distillation._indices(16, CONFIG, step)
    ]
    assert sorted(epoch) == sorted(following) == list(range(16))
    assert epoch != following


def test_distillation_goes_on_from_a_compensation(tiny: TinyModel, tmp_path: Path) -> None:
    """The new adapter holds both changes, and reads the same in peft."""
    start = compensated(tiny, fresh(tiny), tmp_path / "start")
    trained = tmp_path / "trained"
    log = train(tiny, trained, start=start, lora_alpha=16, learning_rate=0.001)
    before, after = (held_out_kl(tiny, PLAN, each) for each in (start, trained))
    assert log.held_out[0] == pytest.approx(before, abs=1e-4)
    assert log.held_out[12] == pytest.approx(after, abs=1e-4)
    assert after < 0.98 * before

    merged = fresh(tiny)
    merge(merged, Adapter(trained))
    read = PeftModel.from_pretrained(fresh(tiny), trained)
    tokens = torch.tensor([random_tokens(11)])
    with torch.inference_mode():
        assert_near(read(tokens).logits, merged(tokens).logits)


def test_a_merged_model_is_the_adapted_reference(tiny: TinyModel, tmp_path: Path) -> None:
    train(tiny, tmp_path, steps=3)
    model = fresh(tiny)
    merge(model, Adapter(tmp_path))
    plan = tiny.plan(PLAN)
    reference = ReferenceModel(tiny.config, Checkpoint(tiny.path, Adapter(tmp_path)), plan)
    tokens = random_tokens(11)
    with torch.inference_mode(), grouped(model, plan.groups):
        assert_near(model(torch.tensor([tokens])).logits[0], reference.logits(tokens))
