"""Ranks that meet over real connections compute the model that the reference defines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.connected_ranks import connected
from helpers.tiny_models import (
    BYPASSES,
    CPU,
    LocalModel,
    TinyModel,
    TinyModelFactory,
    assert_near,
    ends_of,
    plans,
    random_tokens,
    tiny_config,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cqil_dist.assignment import Assignment, Round, Stage, assign, follow
from cqil_dist.costs import ModelShape, Piece, evenly
from cqil_dist.exchange import TcpExchange
from cqil_dist.model.step import Segment
from cqil_dist.plan import Group, Plan

CUTS = (5, 1, 3, 1, 1)


def assert_is_reference(model: TinyModel, assignment: Assignment) -> None:
    tokens = random_tokens(sum(CUTS))
    expected = model.reference_logits(assignment.plan, tokens)[ends_of(CUTS)]
    with connected(model, assignment) as ranks:
        assert_near(ranks.logits(tokens, CUTS), expected)


def biased(layers: int = 9, **changes: Any) -> Any:
    """Biases wherever Llama may have them, so that one which is added twice shows."""
    return tiny_config(
        num_hidden_layers=layers, **{"attention_bias": True, "mlp_bias": True, **changes}
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("bypass", BYPASSES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_compute_the_reference(
    size: int, bypass: str, world: int, tiny_model: TinyModelFactory
) -> None:
    """As many ranks as a group has members, fewer and more; a short group at the end; layers that
    stand alone at both ends."""
    model = tiny_model(biased())
    assert_is_reference(
        model, assign(model.plan(f"P{size} S1 E8 D{bypass}"), world, model.config.shape)
    )


@pytest.mark.parametrize(
    "config",
    [
        tiny_config("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=3),
        tiny_config("qwen3", tie_word_embeddings=True, head_dim=12),
        tiny_config("mistral", sliding_window=3),
    ],
    ids=["qwen2", "qwen3", "mistral"],
)
def test_every_family_is_the_reference_on_two_ranks(
    config: Any, tiny_model: TinyModelFactory
) -> None:
    """Concurrent layers of different windows, on one rank and on different ones."""
    model = tiny_model(config)
    assert_is_reference(model, assign(model.plan("P4 S1 E5 D1"), 2, model.config.shape))


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_plan_is_the_reference_on_any_number_of_ranks(
    data: st.DataObject, tiny_model: TinyModelFactory
) -> None:
    model = tiny_model(biased())
    drawn = data.draw(plans(max_layers=9))
    plan = Plan.covering(drawn.groups, 9)
    assert_is_reference(model, assign(plan, data.draw(st.integers(1, 4)), model.config.shape))


@pytest.mark.parametrize("bypass", BYPASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_hold_the_same_bits(
    bypass: str, dtype: torch.dtype, tiny_model: TinyModelFactory
) -> None:
    """Else ranks would drift apart, and their shards of the vocabulary with them.

    The last group is shared, since what a single rank computed is the same everywhere anyhow.
    """
    model = tiny_model(biased())
    assignment = assign(model.plan(f"P3 S3 E9 D{bypass}"), 3, model.config.shape)
    assert assignment.stages[-1].workers == (0, 1, 2)
    tokens = random_tokens(12)
    with connected(model, assignment, dtype=dtype) as ranks:
        steps = [ranks.hidden([Segment(0, 0, 11, 1)], tokens[:11])]
        steps.append(ranks.hidden([Segment(0, 11, 1, 1)], tokens[11:]))
    for first, *others in steps:
        assert first.dtype is dtype
        for other in others:
            assert torch.equal(first, other)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_rounds_are_those_the_assignment_counts(world: int, tiny_model: TinyModelFactory) -> None:
    """`rounds_led`, summed over ranks, counts each exchange of a token once."""
    model = tiny_model(biased())
    assignment = assign(model.plan("P2 S1 E8 D1"), world, model.config.shape)
    with connected(model, assignment) as ranks:
        ranks.logits(random_tokens(4), (2, 1, 1))
        led = [exchange.stats.rounds_led for exchange in ranks.exchanges]
    assert sum(led) == 3 * assignment.rounds


WINDOWS = tiny_config("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=3)


@pytest.mark.parametrize("config", [None, WINDOWS], ids=["llama", "qwen2_windows"])
@pytest.mark.parametrize("slots", [(0, 1, 2), (3, 1, 4)], ids=["adjacent", "apart"])
@pytest.mark.parametrize("world", [1, 2])
def test_sequences_that_share_steps_do_not_touch_each_other(
    world: int, slots: tuple[int, int, int], config: Any, tiny_model: TinyModelFactory
) -> None:
    """Two decode, at different lengths, while a third one's prompt is computed in chunks."""
    model = tiny_model(config)
    plan = model.plan("P3 S1 E4 D1")
    first, second, third = (random_tokens(20, seed) for seed in (1, 2, 3))
    a, b, c = slots
    with connected(model, assign(plan, world, model.config.shape)) as ranks:
        ranks.forward([Segment(a, 0, 13, 1)], first[:13])
        ranks.forward([Segment(b, 0, 4, 1)], second[:4])
        shared = [
            ranks.forward(
                [
                    Segment(a, 13 + step, 1, 1),
                    Segment(b, 4 + step, 1, 1),
                    Segment(c, 5 * step, 5, int(step == 3)),
                ],
                [first[13 + step], second[4 + step], *third[5 * step : 5 * step + 5]],
            )
            for step in range(4)
        ]
        # A chunk of a single token, and one that asks for nothing, in front of others.
        last = ranks.forward([Segment(b, 8, 1, 0), Segment(a, 17, 1, 1)], [second[8], first[17]])
    one, two, three = (model.reference_logits(plan, tokens) for tokens in (first, second, third))
    for step, rows in enumerate(shared):
        expected = [one[13 + step], two[4 + step]] + ([three[19]] if step == 3 else [])
        assert_near(rows, torch.stack(expected))
    assert_near(last, one[17:18])


@pytest.mark.parametrize("world", [1, 2])
def test_logits_may_be_wanted_after_several_tokens_of_a_segment(
    world: int, tiny_model: TinyModelFactory
) -> None:
    """As prompts' logprobs take: of whole chunks, of their ends, and beside those of others."""
    model = tiny_model()
    plan = model.plan("P3 S1 E4 D1")
    first, second = random_tokens(9, 1), random_tokens(8, 2)
    one, two = (model.reference_logits(plan, tokens) for tokens in (first, second))
    with connected(model, assign(plan, world, model.config.shape)) as ranks:
        whole = ranks.forward([Segment(0, 0, 4, 4)], first[:4])
        mixed = ranks.forward(
            [Segment(2, 0, 3, 2), Segment(0, 4, 5, 3), Segment(1, 0, 4, 0)],
            [*second[:3], *first[4:], *second[:4]],
        )
    assert_near(whole, one[:4])
    assert_near(mixed, torch.cat([two[1:3], one[6:9]]))


@pytest.mark.parametrize("config", [None, WINDOWS], ids=["llama", "qwen2_windows"])
def test_what_a_slot_held_before_does_not_matter(config: Any, tiny_model: TinyModelFactory) -> None:
    """A shorter sequence follows a longer one in its slot, beside another of full length."""
    model = tiny_model(config)
    plan = model.plan("P3 S1 E4 D1")
    old, new, other = random_tokens(30, 1), random_tokens(4, 2), random_tokens(31, 3)
    local = LocalModel(model, plan)
    local.forward([Segment(1, 0, 30, 1)], old)
    local.forward([Segment(0, 0, 30, 1)], other[:30])
    local.forward([Segment(1, 0, 3, 1)], new[:3])
    both = local.forward([Segment(0, 30, 1, 1), Segment(1, 3, 1, 1)], [other[30], new[3]])
    expected = [model.reference_logits(plan, tokens)[-1] for tokens in (other, new)]
    assert_near(both, torch.stack(expected))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_sequence_that_overflowed_leaves_its_slot_usable(
    broken: float, tiny_model: TinyModelFactory
) -> None:
    """As float16 does: its request fails, and the next one in that slot must not."""
    model = tiny_model()
    plan = model.plan("P3 S1 E4 D1")
    new, other = random_tokens(4, 2), random_tokens(31, 3)
    local = LocalModel(model, plan)
    hidden = torch.full((30, model.config.hidden_size), broken)
    exchange = TcpExchange(0, {}, {}, model.config.hidden_size, torch.float32, CPU, max_bytes=1)
    local.program.step([Segment(1, 0, 30, 1)], hidden, exchange)
    local.forward([Segment(0, 0, 30, 1)], other[:30])
    local.forward([Segment(1, 0, 3, 1)], new[:3])
    both = local.forward([Segment(0, 30, 1, 1), Segment(1, 3, 1, 1)], [other[30], new[3]])
    expected = [model.reference_logits(plan, tokens)[-1] for tokens in (other, new)]
    assert_near(both, torch.stack(expected))


def test_a_slot_can_be_filled_to_its_last_token(tiny_model: TinyModelFactory) -> None:
    model = tiny_model()
    plan = model.plan("sequential")
    tokens = random_tokens(24)
    local = LocalModel(model, plan, slots=1, max_len=24)
    expected = model.reference_logits(plan, tokens)[[22, 23]]
    assert_near(local.logits(tokens, (23, 1)), expected)


# Layers in shards: the assignments below are written by hand, rounds and all.


def everyone_to_everyone(index: int, tensors: Sequence[int]) -> Round:
    """A round in which every rank needs what every rank contributes."""
    everyone = tuple(rank for rank, count in enumerate(tensors) if count)
    return Round(index, (everyone,) * len(tensors), tuple(tensors))


def shard(layer: int, index: int, shards: int, shape: ModelShape) -> Piece:
    """One of `shards` parts of a layer: whole key/value heads, and about as many columns."""
    heads = evenly(shape.num_kv_heads, shards)[index]
    queries = shape.queries_per_kv
    return Piece(
        layer,
        range(heads.start * queries, heads.stop * queries),
        evenly(shape.intermediate_size, shards)[index],
    )


def bundles_of(group: Group, pieces: Sequence[Piece]) -> int:
    """Attention outputs that a rank with these pieces has: one for every set of those who see."""
    return len(Stage(group, (tuple(pieces),)).attention_bundles(0))


def tensor_parallel(plan: Plan, world: int, shape: ModelShape) -> Assignment:
    """Every layer of every group in `world` shards, one on each rank: two rounds a group."""
    stages = []
    for index, group in enumerate(plan.groups):
        pieces = tuple(
            tuple(shard(layer, rank, world, shape) for layer in group.layers)
            for rank in range(world)
        )
        bundles = [bundles_of(group, own) for own in pieces]
        attention = everyone_to_everyone(2 * index, bundles)
        output = everyone_to_everyone(2 * index + 1, [1] * world)
        stages.append(Stage(group, pieces, attention, output))
    rows = assign(plan, world, shape).head_rows
    return Assignment(plan, world, tuple(stages), rows)


def sharded_groups(plan: Plan, shards: int, shape: ModelShape) -> Assignment:
    """Each member of a group of two on `shards` ranks of its own; layers alone on all ranks."""
    world = 2 * shards
    stages: list[Stage] = []
    rounds = 0
    for group in plan.groups:
        if group.size == 1:
            pieces = tuple((shard(group.layers[0], rank, world, shape),) for rank in range(world))
        else:
            assert group.size == 2
            pieces = tuple(
                (shard(layer, index, shards, shape),)
                for layer in group.layers
                for index in range(shards)
            )
        holders = {
            layer: [rank for rank in range(world) if pieces[rank][0].layer == layer]
            for layer in group.layers
        }
        sources = tuple(
            tuple(
                source
                for seen in group.visible(group.layers.index(pieces[rank][0].layer))
                for source in holders[group.layers[seen]]
            )
            for rank in range(world)
        )
        attention = None
        if any(sources):
            attention = Round(rounds, sources, (1,) * world)
            rounds += 1
        stages.append(Stage(group, pieces, attention, everyone_to_everyone(rounds, [1] * world)))
        rounds += 1
    return Assignment(plan, world, tuple(stages), assign(plan, world, shape).head_rows)


SHARDED = {
    "llama": lambda: biased(layers=4),
    "qwen2": lambda: tiny_config("qwen2", num_hidden_layers=4),
    "qwen3": lambda: tiny_config("qwen3", num_hidden_layers=4, attention_bias=True),
}


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("family", SHARDED)
def test_sequential_layers_in_shards_are_the_reference(
    family: str, shards: int, tiny_model: TinyModelFactory
) -> None:
    """Tensor parallelism; on two shards with one and two of the three key/value heads."""
    model = tiny_model(SHARDED[family]())
    assert_is_reference(
        model, tensor_parallel(model.plan("sequential"), shards, model.config.shape)
    )


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("bypass", BYPASSES)
def test_wide_groups_in_shards_are_the_reference(
    bypass: str, shards: int, tiny_model: TinyModelFactory
) -> None:
    """Every rank holds a shard of each member of the group."""
    model = tiny_model(SHARDED["llama"]())
    assert_is_reference(
        model, tensor_parallel(model.plan(f"P3 S1 E4 D{bypass}"), shards, model.config.shape)
    )


@pytest.mark.parametrize("bypass", BYPASSES)
def test_members_of_a_group_may_each_be_in_shards(
    bypass: str, tiny_model: TinyModelFactory
) -> None:
    """A group of two on four ranks; its layers alone before and after are in four shards."""
    model = tiny_model(biased(layers=4, num_key_value_heads=6))
    assert_is_reference(
        model, sharded_groups(model.plan(f"P2 S1 E3 D{bypass}"), 2, model.config.shape)
    )


def test_a_shard_may_be_left_without_heads(tiny_model: TinyModelFactory) -> None:
    """Four ranks and three key/value heads: one rank computes feed-forward columns only."""
    model = tiny_model(SHARDED["llama"]())
    assert_is_reference(model, tensor_parallel(model.plan("sequential"), 4, model.config.shape))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_ungrouped_layers_are_split_over_all_ranks(
    family: str, kv_heads: int, world: int, tiny_model: TinyModelFactory
) -> None:
    """Heads that ranks do not divide, fewer key/value heads than ranks, and heads read by two."""
    changes: dict[str, Any] = {"num_key_value_heads": kv_heads, "num_hidden_layers": 4}
    if family == "llama":
        changes |= {"attention_bias": True, "mlp_bias": True}
    if family == "mistral":
        changes |= {"sliding_window": 3}
    model = tiny_model(tiny_config(family, **changes))
    plan = model.plan("P2 S1 E3 D1")
    assert_is_reference(model, assign(plan, world, model.config.shape, "shard"))


@pytest.mark.parametrize("bypass", BYPASSES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_plan_with_split_layers_is_the_reference_whatever_their_bypass(
    world: int, bypass: str, tiny_model: TinyModelFactory
) -> None:
    """Also where a layer stands alone with a bypass of its own: one round where it is parallel."""
    model = tiny_model(biased(layers=5))
    groups = [{"layers": [0], "bypass": bypass}, {"layers": [1, 2], "bypass": bypass}]
    plan = Plan.parse({"groups": groups}, 5)
    assert_is_reference(model, assign(plan, world, model.config.shape, "shard"))


@pytest.mark.parametrize("bypass", BYPASSES)
def test_a_plan_that_follows_split_layers_computes_them_as_they_lie(
    bypass: str, tiny_model: TinyModelFactory
) -> None:
    """Layers that are split for one plan are members of groups in another."""
    model = tiny_model(biased(layers=5))
    base = assign(model.plan("P2 S3 E5 D1"), 3, model.config.shape, "shard")
    assert_is_reference(model, follow(model.plan(f"P3 S0 E5 D{bypass}"), base))
    assert_is_reference(model, follow(model.plan("sequential"), base))


def test_groups_of_any_bypass_may_follow_each_other(tiny_model: TinyModelFactory) -> None:
    model = tiny_model(biased())
    groups = [{"layers": [2 * i, 2 * i + 1], "bypass": b} for i, b in enumerate(BYPASSES)]
    plan = Plan.parse({"groups": groups}, 9)
    assert [group.bypass.to_json() for group in plan.groups] == [0, 1, "full", "parallel", 0]
    assert plan.groups[-1] == Group((8,))
    for world in (2, 3):
        assert_is_reference(model, assign(plan, world, model.config.shape))
