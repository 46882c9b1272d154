"""Two plans over the same ranks: each computes what it would alone, beside the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from helpers.connected_ranks import MAX_LEN, SLOTS, connected
from helpers.observed_engine import ObservedModel, ask, finish, greedy, serving
from helpers.tiny_models import (
    BYPASSES,
    TinyModel,
    TinyModelFactory,
    assert_near,
    plans,
    random_tokens,
    tiny_config,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cqil_dist.assignment import Assignment, assign, follow
from cqil_dist.model.footprint import footprint
from cqil_dist.model.precision import Precision
from cqil_dist.model.reference import ReferenceModel
from cqil_dist.model.step import Segment
from cqil_dist.plan import Plan

SEQUENTIAL = Plan.sequential(6)
FLOAT32 = Precision.of("float32")


@pytest.fixture
def model(tiny_model: TinyModelFactory) -> TinyModel:
    """Biases, so that one which is added twice shows."""
    return tiny_model(tiny_config(attention_bias=True, mlp_bias=True))


def assert_each_is_its_reference(model: TinyModel, assignments: Sequence[Assignment]) -> None:
    """Sequences of the two plans fill slots side by side, chunk by chunk; then one slot changes
    its plan, and is shorter than it was."""
    tokens = {slot: random_tokens(12, seed=slot) for slot in range(4)}
    plan_of = {0: 0, 1: 1, 2: 0, 3: 1}
    done = dict.fromkeys(tokens, 0)
    given: dict[int, list[torch.Tensor]] = defaultdict(list)

    def step(plan: int, counts: dict[int, int]) -> None:
        segments = [Segment(slot, done[slot], count, 1) for slot, count in counts.items()]
        ids = [id for s in segments for id in tokens[s.slot][s.start : s.start + s.count]]
        for segment, row in zip(segments, ranks.forward(segments, ids, plan), strict=True):
            given[segment.slot].append(row)
            done[segment.slot] = segment.start + segment.count

    def expected(slot: int) -> torch.Tensor:
        return model.reference_logits(assignments[plan_of[slot]].plan, tokens[slot])

    with connected(model, *assignments) as ranks:
        step(0, {0: 5})
        step(1, {1: 3, 3: 6})
        step(0, {0: 1, 2: 4})
        step(1, {1: 1, 3: 1})
        step(0, {0: 1, 2: 1})
        step(1, {3: 5, 1: 8})
        step(0, {0: 5, 2: 7})
        for slot, ends in {0: [5, 6, 7, 12], 1: [3, 4, 12], 2: [4, 5, 12], 3: [6, 7, 12]}.items():
            rows = [end - 1 for end in ends]
            assert_near(torch.stack(given[slot]), expected(slot)[rows])
        given.clear()
        tokens[0], plan_of[0], done[0] = random_tokens(4, seed=9), 1, 0
        tokens[1], plan_of[1], done[1] = random_tokens(5, seed=10), 0, 0
        step(1, {0: 3})
        step(0, {1: 4})
        step(1, {0: 1})
        step(0, {1: 1})
        assert_near(torch.stack(given[0]), expected(0)[[2, 3]])
        assert_near(torch.stack(given[1]), expected(1)[[3, 4]])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("bypass", BYPASSES)
def test_a_plan_and_the_sequential_one(
    bypass: str, size: int, world: int, model: TinyModel
) -> None:
    """A rank holds single layers of each group, or several together, which are folded apart."""
    base = assign(model.plan(f"P{size} S1 E6 D{bypass}"), world, model.config.shape)
    assert_each_is_its_reference(model, [base, follow(SEQUENTIAL, base)])


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_two_plans(data: st.DataObject, model: TinyModel) -> None:
    """A plan that follows another's layers has groups where those fall, and ranks without any."""
    first, second = (Plan.covering(data.draw(plans(max_layers=6)).groups, 6) for _ in range(2))
    base = assign(first, data.draw(st.integers(1, 3)), model.config.shape)
    assert_each_is_its_reference(model, [base, follow(second, base)])


def test_single_layers_of_each_group_are_held_once(model: TinyModel) -> None:
    """Weights and cache: comparing with the sequential plan costs a rank nothing."""
    base = assign(model.plan("P2 S0 E6 D1"), 2, model.config.shape)
    both = (base, follow(SEQUENTIAL, base))
    with connected(model, base) as ranks:
        alone = [(program.weight_bytes, program.kv_bytes) for program in ranks.programs]
    with connected(model, *both) as ranks:
        together = [(program.weight_bytes, program.kv_bytes) for program in ranks.programs]
    assert together == alone
    for rank in range(2):
        told = footprint(both, rank, model.config, FLOAT32)
        assert told == footprint([base], rank, model.config, FLOAT32)


@pytest.mark.parametrize("plan", ["P2 S0 E6 D1", "P3 S1 E6 D0", "P3 S0 E6 Dfull", "sequential"])
@pytest.mark.parametrize("world", [1, 2])
def test_two_plans_take_the_memory_that_is_told_beforehand(
    world: int, plan: str, tiny_model: TinyModelFactory
) -> None:
    """A spare reads a rank's weights where that much is free."""
    model = tiny_model()
    base = assign(model.plan(plan), world, model.config.shape)
    both = (base, follow(model.plan("P2 S1 E5 D0"), base))
    with connected(model, *both) as ranks:
        for rank, program in enumerate(ranks.programs):
            told = footprint(both, rank, model.config, FLOAT32).total(SLOTS * MAX_LEN)
            assert program.weight_bytes + program.kv_bytes == told


def test_an_engine_gives_each_request_its_plan_s_tokens(model: TinyModel) -> None:
    """While both have work their steps alternate, and no step has requests of both."""
    plans = (model.plan("P2 S0 E6 D1"), SEQUENTIAL)
    prompts = [random_tokens(length, seed=length) for length in (3, 21, 1, 13)]
    asked = [(prompt, plan) for prompt in prompts for plan in (0, 1)]
    references = [ReferenceModel(model.config, model.checkpoint, plan) for plan in plans]
    steps = ObservedModel(model, plans[0], 8, compare=plans[1])
    with serving(model, steps, slots=8, prefill_tokens=8) as engine:
        with steps.held():
            # One that decodes already, so that the others meet it on its way.
            first = engine.submit(ask(prompts[0], greedy(30), plan_index=1))
            assert steps.started.wait(timeout=30)
            requests = [engine.submit(ask(p, greedy(9), plan_index=plan)) for p, plan in asked[:7]]
        completions = [finish(request) for request in requests]
        assert list(finish(first).token_ids) == references[1].greedy(prompts[0], 30)
    expected = [references[plan].greedy(prompt, 9) for prompt, plan in asked[:7]]
    assert [list(completion.token_ids) for completion in completions] == expected
    # Else this would not show which plan was walked.
    assert all(a != b for a, b in zip(expected[0::2], expected[1::2], strict=False))
    walked = [step.plan_index for step in steps.steps]
    both = walked[: len(walked) - walked[::-1].index(0)]  # as long as there is work of plan 0
    assert both == [1, 0] * (len(both) // 2)
    plan_of_slot: dict[int, set[int]] = defaultdict(set)
    for step in steps.steps:
        for segment in step.segments:
            plan_of_slot[segment.slot].add(step.plan_index)
    assert all(len(seen) == 1 for seen in plan_of_slot.values())


def test_an_engine_s_two_plans_may_be_asked_the_same(model: TinyModel) -> None:
    """One prompt under both, as one does who compares them: each scores it in its own way."""
    plans = (model.plan("P3 S0 E6 D0"), SEQUENTIAL)
    prompt = random_tokens(19, seed=4)
    steps = ObservedModel(model, plans[0], 2, compare=plans[1])
    params = greedy(0, prompt_logprobs=0)
    with serving(model, steps, slots=2, prefill_tokens=8) as engine:
        with steps.held():
            requests = [engine.submit(ask(prompt, params, plan_index=plan)) for plan in (0, 1)]
        completions = [finish(request) for request in requests]
    for plan, completion in zip(plans, completions, strict=True):
        logprobs = model.reference_logits(plan, prompt).log_softmax(-1)
        expected = [float(row[id]) for row, id in zip(logprobs, prompt[1:], strict=False)]
        assert completion.prompt_logprobs is not None
        given = [entry.logprob for entry in completion.prompt_logprobs[1:]]
        assert given == pytest.approx(expected, abs=1e-3)
