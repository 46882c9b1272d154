"""Compensation lowers a plan's divergence on text that it was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.planning_cases import HELD_OUT, fitted_loras, fresh, held_out_kl, random_windows
from helpers.tiny_models import TinyModel

from cqil_dist.errors import TextError
from cqil_dist.model.adapter import Adapter, write_adapter
from cqil_dist.plan import Bypass, Group, Plan
from cqil_dist.planning.measure.baseline import Baseline
from cqil_dist.planning.measure.grouped_model import hidden_after
from cqil_dist.planning.measure.merging import merge
from cqil_dist.planning.recover import compensation
from cqil_dist.planning.recover.compensation import Compensation
from cqil_dist.planning.search.comparison import Comparison
from cqil_dist.progress import SilentProgress

PLAN = "P2 S0 E6 D0"
QUIET = SilentProgress()


def test_compensation_lowers_the_divergence_of_text_not_fitted_on(
    tiny: TinyModel, tmp_path: Path
) -> None:
    model = fresh(tiny)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    loras = fitted_loras(
        Compensation(model, random_windows(64, 3), QUIET, rank=48), tiny.plan(PLAN)
    )
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    write_adapter(tmp_path, loras, str(tiny.path), tiny.plan(PLAN).to_json())
    assert held_out_kl(tiny, PLAN, tmp_path) < 0.9 * held_out_kl(tiny, PLAN, None)


def test_plans_and_groups_are_compared_as_they_will_be(tiny: TinyModel, tmp_path: Path) -> None:
    """A search for compensated plans measures a plan with the changes that it will have."""
    model, plan = fresh(tiny), tiny.plan("P2 S2 E6 D0")
    group = Group((2, 3), Bypass("1"))
    baseline = Baseline(model, HELD_OUT, QUIET)
    plain = Comparison(baseline, None, tmp_path)
    fitting = Compensation(model, random_windows(64, 3), QUIET, rank=48)
    compensated = Comparison(baseline, fitting, tmp_path)
    found = compensated.compare(plan).kl
    assert found < 0.9 * plain.compare(plan).kl
    assert compensated.compare_group(group).kl < plain.compare_group(group).kl
    assert compensated.compare(tiny.plan("sequential")).kl == pytest.approx(0, abs=1e-6)

    loras = fitted_loras(fitting, plan)
    write_adapter(tmp_path / "adapter", loras, str(tiny.path), plan.to_json())
    merge(model, Adapter(tmp_path / "adapter"))
    assert baseline.compare(plan.groups).kl == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("wild", ["output", "target", "both"])
def test_a_token_that_grows_a_thousandfold_does_not_spoil_the_map(wild: str) -> None:
    """The original model makes some such tokens in every text, and groups may make others."""
    generator = torch.Generator().manual_seed(0)
    inputs_TK, output_TD = torch.randn(2, 1000, 8, generator=generator)
    map_KD = 0.1 * torch.randn(8, 8, generator=generator)
    target_TD = output_TD + inputs_TK @ map_KD
    for name, values_TD in (("output", output_TD), ("target", target_TD)):
        if wild in (name, "both"):
            values_TD[0] *= 1000
    relative = compensation._relative(inputs_TK, output_TD, target_TD)
    b_DR, a_RK = compensation._reduced_rank_ridge([relative], 1e-6, 8)
    assert (a_RK.T @ b_DR.T - map_KD).norm() < 0.05 * map_KD.norm()


def test_what_follows_a_changed_layer_is_fitted_to_it(tiny: TinyModel) -> None:
    """A single layer may be changed too, by parallel attention and feed-forward."""
    plan = Plan.covering([Group((1,), Bypass("parallel")), Group((3, 4))], 6)
    loras = fitted_loras(Compensation(fresh(tiny), random_windows(8, 3), QUIET), plan)
    fitted = {int(module.split(".")[2]) for module in loras}
    assert fitted == {1, 2, 3, 4, 5}


def test_a_group_is_fitted_to_what_those_before_it_give_now(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output of the groups before is not computed again, but updated with their changes."""
    model = fresh(tiny)
    inputs: list[list[torch.Tensor]] = []
    correct = compensation._Fit.correct_outputs

    def watched(fit: compensation._Fit, targets: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        inputs.append(list(fit.group_inputs))
        return correct(fit, targets)

    monkeypatch.setattr(compensation._Fit, "correct_outputs", watched)
    groups = tiny.plan(PLAN).groups
    with Compensation(model, random_windows(8, 3), QUIET).applied(groups), torch.no_grad():
        for group, given, following in zip(groups, inputs, inputs[1:], strict=False):
            for x, output in zip(given, following, strict=True):
                torch.testing.assert_close(
                    hidden_after(model, [group], x), output, atol=1e-4, rtol=1e-4
                )
    assert len(inputs) == 3


def test_the_directions_that_explain_most_are_kept(tiny: TinyModel, tmp_path: Path) -> None:
    """A map of low rank is a part of the full map, and each further direction corrects more."""
    plan = tiny.plan(PLAN)
    kls = [held_out_kl(tiny, PLAN, None)]
    for rank in (2, 16):
        fitting = Compensation(fresh(tiny), random_windows(64, 3), QUIET, rank=rank)
        loras = fitted_loras(fitting, plan)
        assert all(len(lora.a_RI) == lora.b_OR.shape[1] == rank for lora in loras.values())
        write_adapter(tmp_path / str(rank), loras, str(tiny.path), plan.to_json())
        kls.append(held_out_kl(tiny, PLAN, tmp_path / str(rank)))
    assert kls == sorted(kls, reverse=True)


def test_what_cannot_be_fitted_is_said(tiny: TinyModel) -> None:
    little = Compensation(fresh(tiny), random_windows(1, 3), QUIET, ridge=0.0)
    with pytest.raises(TextError, match="give more text, or a larger ridge"):
        fitted_loras(little, tiny.plan(PLAN))
    assert fitted_loras(little, tiny.plan("sequential")) == {}, "there is nothing to take back"
