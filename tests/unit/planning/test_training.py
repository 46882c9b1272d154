"""Compensation and distillation bring a plan back towards the original, on text not trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import TinyModel, assert_near, random_tokens

from cqil_dist.errors import LaunchError, PlanError, TextError
from cqil_dist.model.adapter import Adapter, write_adapter
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.reference import ReferenceModel
from cqil_dist.plan import Bypass, Group, Plan
from cqil_dist.planning import distillation
from cqil_dist.planning.comparison import Comparison
from cqil_dist.planning.compensation import Compensation, compensate
from cqil_dist.planning.distillation import TrainingLog, distill
from cqil_dist.planning.grouped_model import grouped, load_model
from cqil_dist.planning.merging import merge
from cqil_dist.planning.original import Original
from cqil_dist.planning.texts import Windows
from cqil_dist.planning.training_config import TrainingConfig
from cqil_dist.progress import SilentProgress

PLAN = "P2 S0 E6 D0"
CPU = torch.device("cpu")
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


def windows(count: int, seed: int, length: int = 32) -> Windows:
    rows = [random_tokens(length, 1000 * seed + row) for row in range(count)]
    return Windows(torch.tensor(rows), "random")


TRAIN, HELD_OUT = windows(16, 1), windows(4, 2)


def fresh(tiny: TinyModel) -> Any:
    return load_model(tiny.path, torch.float32, CPU)


def held_out_kl(tiny: TinyModel, adapter: Path | None) -> float:
    """By the reference, which knows neither peft nor gradients."""
    plan = tiny.plan(PLAN)
    checkpoint = Checkpoint(tiny.path, None if adapter is None else Adapter(adapter))
    changed = ReferenceModel(tiny.config, checkpoint, plan)
    total = 0.0
    for tokens in HELD_OUT.token_ids_WT.tolist():
        given = tiny.original_logits(tokens).log_softmax(-1)
        said = changed.logits(tokens).log_softmax(-1)
        total += float((given.exp() * (given - said)).sum(-1).mean())
    return total / len(HELD_OUT.token_ids_WT)


def train(tiny: TinyModel, output: Path, **changes: Any) -> TrainingLog:
    config = replace(CONFIG, **changes)
    return distill(fresh(tiny), tiny.plan(PLAN), TRAIN, HELD_OUT, config, output, SilentProgress())


def test_distillation_lowers_the_divergence_of_text_not_trained_on(
    tiny: TinyModel, tmp_path: Path
) -> None:
    log = train(tiny, tmp_path, steps=20)
    before, after = held_out_kl(tiny, None), held_out_kl(tiny, tmp_path)
    assert log.held_out[0] == pytest.approx(before, abs=1e-4)
    assert log.held_out[20] == pytest.approx(after, abs=1e-4)
    assert after < 0.9 * before
    inside = Adapter(tmp_path).plan
    assert inside is not None
    assert Plan.parse(inside, 6) == tiny.plan(PLAN)
    Adapter(tmp_path).check(tiny.config)


def test_a_resumed_run_is_an_unbroken_one(tiny: TinyModel, tmp_path: Path) -> None:
    """Killed between two saved states: what came after the last is done again, and the same."""
    unbroken = train(tiny, tmp_path / "unbroken")

    class Killed(Exception):
        pass

    def kill(log: TrainingLog) -> None:
        if len(log.losses) == 6:
            raise Killed

    with pytest.raises(Killed):
        distill(
            fresh(tiny),
            tiny.plan(PLAN),
            TRAIN,
            HELD_OUT,
            CONFIG,
            tmp_path / "broken",
            SilentProgress(),
            on_evaluation=kill,
        )
    resumed = train(tiny, tmp_path / "broken")
    assert resumed.losses == unbroken.losses
    assert resumed.held_out == unbroken.held_out
    weights = [
        load_file(tmp_path / run / "adapter_model.safetensors") for run in ("unbroken", "broken")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert train(tiny, tmp_path / "broken").losses == unbroken.losses, "it is done already"


def test_bfloat16_weights_are_compensated_and_trained_in_float32(
    tiny: TinyModel, tmp_path: Path
) -> None:
    """What a GPU does by default: what is found goes into a float32 adapter."""
    plan = tiny.plan(PLAN)
    model = load_model(tiny.path, torch.bfloat16, CPU)
    changes = compensate(Compensation(model, windows(64, 3), 16), plan, SilentProgress())
    write_adapter(tmp_path / "start", changes, str(tiny.path), plan.to_json())
    distill(
        model,
        plan,
        TRAIN,
        HELD_OUT,
        replace(CONFIG, gradient_checkpointing=True),
        tmp_path / "trained",
        SilentProgress(),
        start=Adapter(tmp_path / "start"),
    )
    kls = [held_out_kl(tiny, each) for each in (None, tmp_path / "start", tmp_path / "trained")]
    assert kls[2] < 0.98 * kls[1] < 0.9 * kls[0]
    written = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}


def test_windows_are_computed_together_or_one_by_one(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = train(tiny, tmp_path / "together", steps=3)
    monkeypatch.setattr(distillation, "_TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(distillation, "_ROWS_AT_ONCE", 7)
    apart = train(tiny, tmp_path / "apart", steps=3)
    assert apart.losses == pytest.approx(together.losses, abs=1e-5)
    assert apart.held_out == pytest.approx(together.held_out, abs=1e-5)


def test_the_first_step_goes_down_the_divergence(tiny: TinyModel, tmp_path: Path) -> None:
    """The gradient that training takes is that of the KL divergence, as torch derives it."""
    plan = tiny.plan(PLAN)
    student = distillation._Student(fresh(tiny), CONFIG, None)
    tokens_BT = TRAIN.token_ids_WT[:2]
    loss = distillation._add_gradients(student, plan, tokens_BT, CONFIG)
    found = {name: p.grad.clone() for name, p in gradients(student.lora)}
    student.lora.zero_grad()
    with torch.no_grad(), student.lora.disable_adapter():
        given = student.lora(tokens_BT).logits.log_softmax(-1)
    with grouped(student.lora, plan.groups):
        said = student.lora(tokens_BT).logits.log_softmax(-1)
        kl = F.kl_div(said, given, log_target=True, reduction="sum") / tokens_BT.numel()
        kl.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(float(kl.detach()), abs=1e-5)
    for name, p in gradients(student.lora):
        torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-3)


def gradients(model: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.grad is not None]


def test_a_folder_of_another_run_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    train(tiny, tmp_path, steps=3)
    with pytest.raises(LaunchError, match="another config; choose another folder"):
        train(tiny, tmp_path, steps=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0 but must be at least 1"),
        ({"warmup_steps": 12}, "warmup_steps is 12 but must be at least 0 and below steps, 12"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0 but must be above 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        replace(CONFIG, **changes)


def test_every_epoch_sees_every_window_once() -> None:
    epoch = [index for step in range(8) for index in distillation._indices(16, CONFIG, step)]
    following = [
        index for step in range(8, 16) for index in distillation._indices(16, CONFIG, step)
    ]
    assert sorted(epoch) == sorted(following) == list(range(16))
    assert epoch != following


def test_compensation_lowers_the_divergence_of_text_not_fitted_on(
    tiny: TinyModel, tmp_path: Path
) -> None:
    model = fresh(tiny)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    changes = compensate(Compensation(model, windows(64, 3), 48), tiny.plan(PLAN), SilentProgress())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    write_adapter(tmp_path, changes, str(tiny.path), tiny.plan(PLAN).to_json())
    assert held_out_kl(tiny, tmp_path) < 0.9 * held_out_kl(tiny, None)


def test_plans_and_groups_are_compared_as_they_will_be(tiny: TinyModel, tmp_path: Path) -> None:
    """A plan that is searched for compensation is measured with the changes it will have."""
    model, plan = fresh(tiny), tiny.plan("P2 S2 E6 D0")
    group = Group((2, 3), Bypass("1"))
    original = Original(model, HELD_OUT, SilentProgress())
    plain = Comparison(original, None, tmp_path)
    fitting = Compensation(model, windows(64, 3), 48)
    compensated = Comparison(original, fitting, tmp_path)
    found = compensated.compare(plan).kl
    assert found < 0.9 * plain.compare(plan).kl
    assert compensated.compare_group(group).kl < plain.compare_group(group).kl
    assert compensated.compare(tiny.plan("sequential")).kl == pytest.approx(0, abs=1e-6)

    changes = compensate(fitting, plan, SilentProgress())
    write_adapter(tmp_path / "adapter", changes, str(tiny.path), plan.to_json())
    merge(model, Adapter(tmp_path / "adapter"))
    assert original.compare(plan).kl == pytest.approx(found, abs=1e-5)


def test_what_follows_a_changed_layer_is_fitted_to_it(tiny: TinyModel) -> None:
    """A layer by itself may be changed too: parallel attention and feed-forward."""
    plan = Plan.covering([Group((1,), Bypass("parallel")), Group((3, 4))], 6)
    changes = compensate(Compensation(fresh(tiny), windows(8, 3)), plan, SilentProgress())
    fitted = {int(module.split(".")[2]) for module in changes}
    assert fitted == {1, 2, 3, 4, 5}


def test_small_ranks_and_too_little_text(tiny: TinyModel, tmp_path: Path) -> None:
    plan = tiny.plan(PLAN)
    changes = compensate(Compensation(fresh(tiny), windows(8, 3), 1), plan, SilentProgress())
    write_adapter(tmp_path, changes, str(tiny.path), plan.to_json())
    Adapter(tmp_path).check(tiny.config)
    with pytest.raises(TextError, match="give more text, or a larger ridge"):
        compensate(Compensation(fresh(tiny), windows(1, 3), ridge=0.0), plan, SilentProgress())
    with pytest.raises(PlanError, match="there is nothing to fit"):
        compensate(
            Compensation(fresh(tiny), windows(1, 3)), tiny.plan("sequential"), SilentProgress()
        )


def test_distillation_goes_on_from_a_compensation(tiny: TinyModel, tmp_path: Path) -> None:
    """The adapter holds both; whoever reads it, peft too, finds what was measured."""
    plan = tiny.plan(PLAN)
    changes = compensate(Compensation(fresh(tiny), windows(64, 3), 16), plan, SilentProgress())
    write_adapter(tmp_path / "start", changes, str(tiny.path), plan.to_json())
    log = distill(
        fresh(tiny),
        plan,
        TRAIN,
        HELD_OUT,
        replace(CONFIG, lora_alpha=16, learning_rate=0.001),
        tmp_path / "trained",
        SilentProgress(),
        start=Adapter(tmp_path / "start"),
    )
    before = held_out_kl(tiny, tmp_path / "start")
    assert log.held_out[0] == pytest.approx(before, abs=1e-4)
    assert log.held_out[12] < 0.98 * before
    assert log.held_out[12] == pytest.approx(held_out_kl(tiny, tmp_path / "trained"), abs=1e-4)

    merged = fresh(tiny)
    merge(merged, Adapter(tmp_path / "trained"))
    read = PeftModel.from_pretrained(fresh(tiny), tmp_path / "trained")
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
