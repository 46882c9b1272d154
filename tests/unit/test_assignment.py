"""Any plan on any number of ranks: the work is whole, even, and reaches everyone who needs it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from helpers.tiny_models import plans
from hypothesis import given
from hypothesis import strategies as st

from cqil_dist.assignment import Assignment, Round, Stage, assign, follow
from cqil_dist.costs import Costs, ModelShape
from cqil_dist.errors import PlanError
from cqil_dist.plan import Plan

WORLDS = st.integers(1, 6)
SHAPE = ModelShape(48, 6, 3, 8, 41, 307)


def rounds_of(assignment: Assignment) -> list[Round]:
    both = [r for s in assignment.stages for r in (s.attention_round, s.output_round)]
    return [each for each in both if each is not None]


@given(plans(), WORLDS)
def test_every_layer_is_computed_exactly_once(plan: Plan, world: int) -> None:
    assignment = assign(plan, world, SHAPE)
    assert [stage.group for stage in assignment.stages] == list(plan.groups)
    for stage in assignment.stages:
        assert len(stage.pieces) == world
        computed = [piece for pieces in stage.pieces for piece in pieces]
        assert sorted(piece.layer for piece in computed) == list(stage.group.layers)
        assert all(piece == SHAPE.whole(piece.layer) for piece in computed)
        for rank, pieces in enumerate(stage.pieces):
            assert [p.layer for p in pieces] == sorted(p.layer for p in pieces)
            assert {p.layer for p in pieces} <= set(assignment.layers_of(rank))
    held = sorted(layer for rank in range(world) for layer in assignment.layers_of(rank))
    assert held == list(range(plan.num_layers))


@given(plans(), WORLDS)
def test_no_rank_holds_two_layers_more_than_another(plan: Plan, world: int) -> None:
    """In every plan: a layer that stands alone can go anywhere, and shares even out."""
    assignment = assign(plan, world, SHAPE)
    loads = [len(assignment.layers_of(rank)) for rank in range(world)]
    assert max(loads) - min(loads) <= 1


@given(plans(), WORLDS)
def test_a_group_runs_on_as_many_ranks_as_it_can(plan: Plan, world: int) -> None:
    for stage in assign(plan, world, SHAPE).stages:
        assert len(stage.workers) == min(stage.group.size, world)
        shares = [len(stage.pieces[rank]) for rank in stage.workers]
        assert max(shares) - min(shares) <= 1


@given(plans(), WORLDS)
def test_whoever_computes_a_stage_has_its_whole_input(plan: Plan, world: int) -> None:
    """Who knows x, followed from the embedding to the head through the rounds alone."""
    assignment = assign(plan, world, SHAPE)
    knows = set(assignment.entry_ranks)
    for stage in assignment.stages:
        workers = {rank for rank, pieces in enumerate(stage.pieces) if pieces}
        assert workers <= knows
        assert stage.residual_owner in workers
        if stage.output_round is None:
            # Only a rank that computed all of the output has it now.
            assert len(workers) == 1
            knows = workers
        else:
            sources = stage.output_round.sources
            for wanted in sources:
                assert wanted == () or wanted == tuple(sorted(workers))
            knows = {rank for rank, wanted in enumerate(sources) if wanted}
    assert knows == set(range(world))


@given(plans(), WORLDS, st.sampled_from(["own", "shard"]))
def test_feed_forward_parts_take_each_visible_attention_output_once(
    plan: Plan, world: int, ungrouped: str
) -> None:
    for stage in assign(plan, world, SHAPE, ungrouped).stages:
        for rank in stage.workers:
            own = [p for p in stage.pieces[rank] if p.heads]
            assert [p for b in stage.attention_bundles(rank) for p in b] == own
            together = stage.feed_forward_bundles(rank)
            assert [p for b in together for p in b] == [p for p in stage.pieces[rank] if p.columns]
            gathered = [b for r in heard_by(stage, rank) for b in stage.attention_bundles(r)]
            for bundle, taken in zip(together, stage.feed_forward_sees(rank), strict=True):
                heads = [(p.layer, h) for n in taken for p in gathered[n] for h in p.heads]
                for piece in bundle:
                    member = stage.group.layers.index(piece.layer)
                    visible = [stage.group.layers[seen] for seen in stage.group.visible(member)]
                    assert sorted(heads) == [
                        (layer, head) for layer in visible for head in range(SHAPE.num_heads)
                    ]


def heard_by(stage: Stage, rank: int) -> tuple[int, ...]:
    """Ranks whose attention outputs `rank` has when its feed-forward parts start, in order."""
    return (rank,) if stage.attention_round is None else stage.attention_round.sources[rank]


@given(plans(), WORLDS)
def test_a_round_is_where_something_crosses_ranks_and_nowhere_else(plan: Plan, world: int) -> None:
    assignment = assign(plan, world, SHAPE)
    stages = assignment.stages
    for index, stage in enumerate(stages):
        owner = {p.layer: rank for rank, pieces in enumerate(stage.pieces) for p in pieces}
        crosses = any(
            owner[layer] != owner[stage.group.layers[seen]]
            for member, layer in enumerate(stage.group.layers)
            for seen in stage.group.visible(member)
        )
        assert (stage.attention_round is not None) == crosses
        last = index + 1 == len(stages)
        needing = set(range(world)) if last else set(stages[index + 1].workers)
        moves = len(stage.workers) > 1 or needing != set(stage.workers)
        assert (stage.output_round is not None) == moves
    rounds = rounds_of(assignment)
    assert [each.index for each in rounds] == list(range(len(rounds)))
    assert assignment.rounds == len(rounds)


@given(plans(), WORLDS)
def test_ranks_agree_on_who_sends_to_whom_and_who_counts(plan: Plan, world: int) -> None:
    for each in rounds_of(assign(plan, world, SHAPE)):
        sends = {(source, target) for source in range(world) for target in each.targets(source)}
        receives = {
            (source, target)
            for target, wanted in enumerate(each.sources)
            for source in wanted
            if source != target
        }
        assert sends == receives
        assert sends, "a round in which nothing moves"
        contributing = {source for wanted in each.sources for source in wanted}
        assert each.leader == min(contributing)
        assert contributing <= {rank for rank, count in enumerate(each.tensor_counts) if count}


@given(st.integers(1, 6), st.integers(6, 400))
def test_head_rows_are_a_partition_of_the_vocabulary_in_rank_order(world: int, vocab: int) -> None:
    shape = replace(SHAPE, vocab_size=vocab)
    rows = assign(Plan.sequential(3), world, shape).head_rows
    assert [row for part in rows for row in part] == list(range(vocab))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


SHAPES = st.builds(
    lambda kv_heads, queries, head_dim, blocks: ModelShape(
        64, kv_heads * queries, kv_heads, head_dim, 8 * blocks, 307
    ),
    st.integers(1, 8),
    st.integers(1, 6),
    st.sampled_from([4, 16]),
    st.integers(1, 40),
)


@given(SHAPES, st.integers(1, 6), st.sampled_from([1, 8]), st.booleans())
def test_a_split_layer_is_whole_again(
    shape: ModelShape, parts: int, block: int, together: bool
) -> None:
    """Every head and every column is one rank's, and columns are cut at a format's groups."""
    pieces = shape.split(5, parts, block, together=together)
    assert len(pieces) == parts
    assert {piece.layer for piece in pieces} == {5}
    assert [h for piece in pieces for h in piece.heads] == list(range(shape.num_heads))
    assert [c for piece in pieces for c in piece.columns] == list(range(shape.intermediate_size))
    assert all(piece.columns.start % block == 0 for piece in pieces if piece.columns)
    assert sum(piece.adds_attention_bias for piece in pieces) == 1
    assert sum(piece.adds_feed_forward_bias for piece in pieces) == 1


@given(SHAPES, st.integers(1, 6))
def test_no_other_cut_of_the_heads_would_leave_the_slowest_rank_less(
    shape: ModelShape, parts: int
) -> None:
    """Where a key/value head is read by two ranks, both read its weights."""
    slowest = max(shape.attention_weights(piece.heads) for piece in shape.split(0, parts))
    evenly = [shape.num_heads * n // parts for n in range(parts + 1)]
    by_kv_head = [shape.num_kv_heads * n // parts * shape.queries_per_kv for n in range(parts + 1)]
    for cuts in (evenly, by_kv_head):
        others = [shape.attention_weights(range(a, b)) for a, b in pairwise(cuts)]
        assert slowest <= max(others)


def test_nine_heads_on_two_ranks_are_five_and_four() -> None:
    """SmolLM2-135M: the second of three key/value heads is read, and cached, by both."""
    shape = ModelShape(576, 9, 3, 64, 1536, 49152)
    first, second = shape.split(0, 2)
    assert (first.heads, second.heads) == (range(5), range(5, 9))
    assert (shape.kv_heads(first.heads), shape.kv_heads(second.heads)) == (range(2), range(1, 3))
    assert (len(first.columns), len(second.columns)) == (768, 768)
    # Where the ranks meet once, columns make up for heads.
    first, second = shape.split(0, 2, together=True)
    times = [
        shape.attention_weights(piece.heads) + shape.feed_forward_weights(piece.columns)
        for piece in (first, second)
    ]
    assert abs(times[0] - times[1]) <= shape.feed_forward_weights(range(2))


@given(plans(), WORLDS)
def test_split_layers_are_on_all_ranks_and_meet_after_either_part(plan: Plan, world: int) -> None:
    assignment = assign(plan, world, SHAPE, "shard")
    owned = assign(plan, world, SHAPE)
    for stage, whole in zip(assignment.stages, owned.stages, strict=True):
        if stage.group.size > 1:
            assert len(stage.workers) == len(whole.workers)
            continue
        assert stage.workers == tuple(range(world))
        meets_twice = world > 1 and bool(stage.group.visible(0))
        assert (stage.attention_round is not None) == meets_twice
        assert (stage.output_round is not None) == (world > 1)


def test_the_slowest_rank_of_every_stage_is_waited_for() -> None:
    costs = Costs(SHAPE, layer_us=100, head_us=60, link_us=10)
    plan = Plan.parse("P2 S2 E4 D1", 5)
    # Four groups of a layer each, 4 exchanges (one owner of the first layers, two of the pair, one
    # hand-over to the head), and half a head.
    owned = assign(plan, 2, SHAPE)
    assert owned.latency_us(costs) == pytest.approx(4 * 100 + 10 * owned.rounds + 30)
    # Three heads each, which read two of the three key/value heads: 10 of 18 parts of the weights.
    attention = 100 * SHAPE.attention_weights(range(6)) / SHAPE.layer_weights
    split = attention * 10 / 18 + (100 - attention) * 21 / 41
    sharded = assign(plan, 2, SHAPE, "shard")
    assert sharded.latency_us(costs) == pytest.approx(3 * split + 100 + 10 * sharded.rounds + 30)


@pytest.mark.parametrize(
    ("plan", "ranks", "rounds"),
    [
        # Eight groups, layer 6 to 7 (the owner changes), 11 to the first group, and the head.
        ("P2 S12 E28 D0", 2, 11),
        # Each group meets once more for its attention outputs.
        ("P2 S12 E28 D1", 2, 19),
        ("P2 S12 E28 Dfull", 2, 19),
        ("P2 S12 E28 Dparallel", 2, 11),
        ("sequential", 1, 0),
        ("P2 S12 E28 D1", 1, 0),
        # Pipelined: one hand-over, and the head.
        ("sequential", 2, 2),
    ],
)
def test_exchanges_a_token_takes(plan: str, ranks: int, rounds: int) -> None:
    assert assign(Plan.parse(plan, 30), ranks, SHAPE).rounds == rounds


@given(plans(), plans(), WORLDS)
def test_a_plan_that_follows_another_has_each_layer_where_it_is_there(
    base: Plan, other: Plan, world: int
) -> None:
    base, other = Plan.covering(base.groups, 24), Plan.covering(other.groups, 24)
    first = assign(base, world, SHAPE)
    second = follow(other, first)
    assert (second.plan, second.world) == (other, world)
    assert [stage.group for stage in second.stages] == list(other.groups)
    assert second.head_rows == first.head_rows
    for rank in range(world):
        assert second.layers_of(rank) == first.layers_of(rank)
    for stage in second.stages:
        computed = [piece.layer for pieces in stage.pieces for piece in pieces]
        assert sorted(computed) == list(stage.group.layers)


@given(plans(), WORLDS)
def test_a_plan_that_follows_itself_is_assigned_as_it_was(plan: Plan, world: int) -> None:
    assignment = assign(plan, world, SHAPE)
    assert follow(plan, assignment) == assignment


def test_plans_of_different_models_cannot_share_ranks() -> None:
    with pytest.raises(PlanError, match="the plans have 3 and 4 layers"):
        follow(Plan.sequential(4), assign(Plan.sequential(3), 2, SHAPE))


def test_no_ranks_and_too_many_are_refused() -> None:
    plan = Plan.sequential(3)
    with pytest.raises(PlanError, match="ranks is 0, but at least 1 rank is needed"):
        assign(plan, 0, SHAPE)
    with pytest.raises(PlanError, match="7 ranks cannot share a vocabulary of 6"):
        assign(plan, 7, replace(SHAPE, vocab_size=6))
    with pytest.raises(PlanError, match="ungrouped is 'auto' but must be one of own, shard"):
        assign(plan, 2, SHAPE, "auto")
