"""The sampler draws from transformers' distribution, and draws the same again on request."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TopKLogitsWarper, TopPLogitsWarper

from cqil_dist.engine import sampler as sampler_module
from cqil_dist.engine.sampler import Sampler
from cqil_dist.errors import CqilError, RequestError
from cqil_dist.sampling_params import SamplingParams

PROMPT = [3, 14, 15, 92, 65]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,  # wide enough for logits that are far from uniform
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def generate(model: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    return model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **settings,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.4},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_p": 0.05},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "temperature": 1.9},
        {"temperature": 1.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_draws_are_the_quantiles_of_generates_distribution(
    model: LlamaForCausalLM, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = generate(model, do_sample=True, **{"top_k": 0, **settings})
    sampler = Sampler(SamplingParams(**settings), PROMPT)
    tokens = theirs.sequences[0].tolist()
    for position, (logits, scores) in enumerate(zip(theirs.logits, theirs.scores, strict=True)):
        probs = scores[0].double().softmax(dim=-1)
        cdf = probs.cumsum(dim=-1)
        for uniform in torch.linspace(0.003, 0.997, 60).tolist():
            if (cdf - uniform).abs().min() < 1e-5:
                continue  # on the edge between two tokens, where rounding decides
            monkeypatch.setattr(sampler_module, "_uniform", lambda seed, position, u=uniform: u)
            history = tokens[: len(PROMPT) + position]
            token = sampler.sample(logits[0], history, position).token_id
            assert token == int(torch.searchsorted(cdf, uniform))


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_is_generates_greedy(model: LlamaForCausalLM, penalty: float) -> None:
    theirs = generate(model, do_sample=False, repetition_penalty=penalty)
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=penalty), PROMPT)
    history = list(PROMPT)
    for position, logits in enumerate(theirs.logits):
        history.append(sampler.sample(logits[0], history, position).token_id)
    assert history == theirs.sequences[0].tolist()


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0])
    assert Sampler(SamplingParams(temperature=0), []).sample(logits, [], 0).token_id == 1


def support(params: SamplingParams, logits_V: Tensor) -> set[int]:
    """Ids of all tokens that could be drawn."""
    scores, ids = Sampler(params, [])._candidates(logits_V[None])
    return set(ids[scores[0].isfinite()].tolist())


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 20.0], ids="spread {}".format)
@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.9, 0.999])
def test_the_shortlist_finds_the_whole_nucleus_of_a_large_vocabulary(
    scale: float, top_p: float
) -> None:
    torch.manual_seed(2)
    # Distinct even when flat: between equal tokens, the nucleus may take either.
    logits = scale * torch.randn(30_000) + torch.linspace(0, 0.5, 30_000)
    ours = support(SamplingParams(top_p=top_p), logits)
    kept = TopPLogitsWarper(top_p)(None, logits[None])[0].isfinite()
    disputed = ours ^ set(kept.nonzero().squeeze(1).tolist())
    # Float32 sums of 30,000 terms in two orders leave the last few tokens to rounding.
    assert logits.softmax(dim=-1)[list(disputed)].sum() < 1e-4
    assert len(ours) >= 1


def test_top_k_keeps_tokens_equal_to_the_last_as_transformers_does() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    kept = TopKLogitsWarper(2)(None, logits[None])[0].isfinite().nonzero().squeeze(1)
    assert support(SamplingParams(top_k=2), logits) == set(kept.tolist()) == {1, 2, 3, 4}
    assert support(SamplingParams(top_k=100), logits) == set(range(6))


def test_the_lowest_draw_takes_no_token_of_probability_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler_module, "_uniform", lambda seed, position: 0.0)
    sampler = Sampler(SamplingParams(min_p=0.5), [])
    assert sampler.sample(torch.tensor([0.0, 0.0, 10.0, 10.0]), [], 0).token_id == 2


def test_frequencies_follow_the_probabilities() -> None:
    torch.manual_seed(3)
    logits = torch.randn(8)
    sampler = Sampler(SamplingParams(seed=11), [])
    draws = 4000
    counts = torch.zeros(8)
    for position in range(draws):
        counts[sampler.sample(logits, [], position).token_id] += 1
    expected = draws * logits.softmax(dim=-1)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 24.3  # 7 degrees of freedom: exceeded once in a thousand seeds


def run(sampler: Sampler, history: list[int], prompt_length: int, length: int) -> list[int]:
    """Extend `history` to `length` output tokens with logits that depend on all of it."""
    history = list(history)
    for position in range(len(history) - prompt_length, length):
        generator = torch.Generator().manual_seed(hash(tuple(history)) % 2**32)
        logits = 2 * torch.randn(50, generator=generator)
        history.append(sampler.sample(logits, history, position).token_id)
    return history


@pytest.mark.parametrize("resume_at", [0, 1, 7, 19])
def test_resuming_anywhere_gives_the_same_tokens(resume_at: int) -> None:
    params = SamplingParams(top_p=0.95, repetition_penalty=1.2, seed=5)
    whole = run(Sampler(params, PROMPT), PROMPT, len(PROMPT), 20)
    cut = whole[: len(PROMPT) + resume_at]
    assert run(Sampler(params, PROMPT), cut, len(PROMPT), 20) == whole


def test_a_drawn_seed_replays_and_differs_between_requests() -> None:
    first, second = Sampler(SamplingParams(), PROMPT), Sampler(SamplingParams(), PROMPT)
    tokens = run(first, PROMPT, len(PROMPT), 20)
    assert run(second, PROMPT, len(PROMPT), 20) != tokens
    replay = Sampler(SamplingParams(seed=first.seed), PROMPT)
    assert run(replay, PROMPT, len(PROMPT), 20) == tokens
    assert float(first.seed) == first.seed < 2**53


def test_seeds_and_positions_are_independent_draws() -> None:
    logits = torch.zeros(1000)
    tokens = {
        (seed, position): Sampler(SamplingParams(seed=seed), []).sample(logits, [], position)
        for seed in (-1, 0, 1)
        for position in range(20)
    }
    assert len({token.token_id for token in tokens.values()}) > 50


def test_logprobs_are_the_models_own_whatever_the_settings() -> None:
    torch.manual_seed(4)
    logits = 3 * torch.randn(40)
    expected = logits.log_softmax(dim=-1)
    params = SamplingParams(temperature=0.2, top_k=3, repetition_penalty=1.9, seed=1, logprobs=4)
    token = Sampler(params, [1, 2]).sample(logits, [1, 2], 0)
    assert token.logprob == pytest.approx(float(expected[token.token_id]))
    best = expected.sort(descending=True)
    assert [token_id for token_id, _ in token.top] == best.indices[:4].tolist()
    assert [logprob for _, logprob in token.top] == pytest.approx(best.values[:4].tolist())


def test_logprobs_only_when_asked() -> None:
    logits = torch.tensor([0.0, 1.0, 5.0])
    plain = Sampler(SamplingParams(temperature=0), []).sample(logits, [], 0)
    assert (plain.logprob, plain.top) == (None, ())
    own = Sampler(SamplingParams(temperature=0, logprobs=0), []).sample(logits, [], 0)
    assert own.logprob is not None
    assert own.top == ()
    # More alternatives than the vocabulary has tokens.
    every = Sampler(SamplingParams(temperature=0, logprobs=20), []).sample(logits, [], 0)
    assert [token_id for token_id, _ in every.top] == [2, 1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_the_models_fault(bad: float, temperature: float) -> None:
    logits = torch.tensor([0.0, bad, 1.0])
    with pytest.raises(CqilError, match="1 of the 3 logits for output token 6 are NaN") as caught:
        Sampler(SamplingParams(temperature=temperature), []).sample(logits, [], 6)
    assert not isinstance(caught.value, RequestError)


def test_the_callers_logits_stay_as_they_are() -> None:
    logits = torch.randn(30)
    before = logits.clone()
    params = SamplingParams(temperature=0.5, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=2)
    Sampler(params, [1]).sample(logits, [1, 2, 3], 2)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("top_k", [0, 1, 2])
@pytest.mark.parametrize("top_p", [1e-30, 1e-8, 1 - 1e-12])
def test_the_narrowest_nucleus_is_the_likeliest_token(top_k: int, top_p: float) -> None:
    """Also where the probability bound that spares a full sort rounds up to 1."""
    logits = torch.zeros(50)
    logits[7] = 40.0
    sampler = Sampler(SamplingParams(top_k=top_k, top_p=top_p, seed=1), PROMPT)
    assert sampler.sample(logits, PROMPT, 0).token_id == 7
