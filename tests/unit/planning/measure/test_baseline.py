"""Divergences and similarities are what their definitions say."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from helpers.planning_cases import fresh
from helpers.tiny_models import TinyModel, random_tokens

from cqil_dist.plan import Group
from cqil_dist.planning.measure.baseline import Baseline
from cqil_dist.planning.measure.similarity import input_similarity, without_layers
from cqil_dist.planning.measure.windows import Windows
from cqil_dist.progress import SilentProgress

PROGRESS = SilentProgress()
TOKENS = [random_tokens(20, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def baseline(tiny: TinyModel) -> Baseline:
    return Baseline(fresh(tiny), Windows(torch.tensor(TOKENS), "random"), PROGRESS)


@pytest.mark.parametrize("plan", ["P2 S0 E6 D1", "P2 S4 E6 D0", "P3 S1 E4 Dfull", "sequential"])
def test_a_plan_diverges_by_its_kl_from_transformers(
    baseline: Baseline, tiny: TinyModel, plan: str
) -> None:
    found = baseline.compare(tiny.plan(plan).groups)
    kls, losses = [], []
    for tokens in TOKENS:
        original = tiny.original_logits(tokens).log_softmax(-1)
        changed = tiny.reference_logits(tiny.plan(plan), tokens).log_softmax(-1)
        kls.append(float((original.exp() * (original - changed)).sum(-1).mean()))
        losses.append(float(F.nll_loss(changed[:-1], torch.tensor(tokens[1:]))))
    assert found.kl == pytest.approx(fmean(kls), abs=1e-4)
    assert found.loss == pytest.approx(fmean(losses), abs=1e-4)


def test_layers_that_are_not_named_are_left_out(baseline: Baseline, tiny: TinyModel) -> None:
    for removed in (0, 2, 5):
        kept = [Group((layer,)) for layer in range(6) if layer != removed]
        x = baseline.model.get_input_embeddings()(torch.tensor(TOKENS[0]))[None]
        positions = torch.arange(20)[None]
        with torch.inference_mode():
            decoder = baseline.model.get_decoder()
            rotary = decoder.rotary_emb(x, positions)
            for layer, module in enumerate(decoder.layers):
                if layer != removed:
                    x = module(x, position_embeddings=rotary, attention_mask=None)
            logits = baseline.model.get_output_embeddings()(decoder.norm(x))[0]
        loss = F.cross_entropy(logits[:-1], torch.tensor(TOKENS[0][1:]))
        one = Baseline(baseline.model, Windows(torch.tensor(TOKENS[:1]), "random"), PROGRESS)
        assert one.compare(kept).loss == pytest.approx(float(loss), abs=1e-4)


def test_similarity_is_the_cosine_of_layers_inputs(baseline: Baseline, tiny: TinyModel) -> None:
    similarity = input_similarity(baseline)
    with torch.inference_mode():
        hidden = tiny.original(torch.tensor(TOKENS), output_hidden_states=True).hidden_states
    expected = F.cosine_similarity(hidden[1], hidden[4], dim=-1).mean()
    assert float(similarity[1, 4]) == pytest.approx(float(expected), abs=1e-5)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(6))


def test_the_layer_that_changes_its_input_least_goes_first() -> None:
    similarity = torch.eye(4)
    for layer, alike in enumerate((0.5, 0.9, 0.7)):
        similarity[layer, layer + 1] = alike
    assert without_layers(similarity, 3) == [0, 2, 3]
    assert without_layers(similarity, 2) == [0, 3]
