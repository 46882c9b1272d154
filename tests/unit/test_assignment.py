"""Any plan on any number of ranks: the work is whole, even, and reaches everyone who needs it."""

from __future__ import annotations

import pytest
from helpers.tiny_models import plans
from hypothesis import given
from hypothesis import strategies as st

from cqil_dist.assignment import Assignment, Piece, Round, Stage, assign, follow
from cqil_dist.errors import PlanError
from cqil_dist.plan import Plan

WORLDS = st.integers(1, 6)
VOCAB = 307


def rounds_of(assignment: Assignment) -> list[Round]:
    both = [r for s in assignment.stages for r in (s.attention_round, s.output_round)]
    return [round for round in both if round is not None]


@given(plans(), WORLDS)
def test_every_layer_is_computed_exactly_once(plan: Plan, world: int) -> None:
    assignment = assign(plan, world, VOCAB)
    assert [stage.group for stage in assignment.stages] == list(plan.groups)
    for stage in assignment.stages:
        assert len(stage.pieces) == world
        computed = [piece for pieces in stage.pieces for piece in pieces]
        assert sorted(piece.layer for piece in computed) == list(stage.group.layers)
        assert all((piece.shard, piece.shards) == (0, 1) for piece in computed)
        for rank, pieces in enumerate(stage.pieces):
            assert [p.layer for p in pieces] == sorted(p.layer for p in pieces)
            assert {p.layer for p in pieces} <= set(assignment.layers_of(rank))
    held = sorted(layer for rank in range(world) for layer in assignment.layers_of(rank))
    assert held == list(range(plan.num_layers))


@given(plans(), WORLDS)
def test_no_rank_holds_two_layers_more_than_another(plan: Plan, world: int) -> None:
    """In every plan: a layer that stands alone can go anywhere, and shares even out."""
    assignment = assign(plan, world, VOCAB)
    loads = [len(assignment.layers_of(rank)) for rank in range(world)]
    assert max(loads) - min(loads) <= 1


@given(plans(), WORLDS)
def test_a_group_runs_on_as_many_ranks_as_it_can(plan: Plan, world: int) -> None:
    for stage in assign(plan, world, VOCAB).stages:
        assert len(stage.workers) == min(stage.group.size, world)
        shares = [len(stage.pieces[rank]) for rank in stage.workers]
        assert max(shares) - min(shares) <= 1


@given(plans(), WORLDS)
def test_whoever_computes_a_stage_has_its_whole_input(plan: Plan, world: int) -> None:
    """Who knows x, followed from the embedding to the head through the rounds alone."""
    assignment = assign(plan, world, VOCAB)
    knows = set(assignment.entry_ranks)
    for stage in assignment.stages:
        workers = {rank for rank, pieces in enumerate(stage.pieces) if pieces}
        assert workers <= knows
        assert stage.carrier in workers
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


@given(plans(), WORLDS)
def test_feed_forward_parts_take_each_visible_attention_output_once(plan: Plan, world: int) -> None:
    for stage in assign(plan, world, VOCAB).stages:
        bundles = {
            (rank, index): bundle
            for rank in stage.workers
            for index, bundle in enumerate(stage.attention_bundles(rank))
        }
        for rank in stage.workers:
            assert [p for b in stage.attention_bundles(rank) for p in b] == list(stage.pieces[rank])
            together = stage.feed_forward_bundles(rank)
            assert [p for b in together for p in b] == list(stage.pieces[rank])
            for feed_forward in together:
                taken = stage.attention_inputs(feed_forward[0])
                for piece in feed_forward:
                    assert stage.attention_inputs(piece) == taken
                    member = stage.group.layers.index(piece.layer)
                    visible = [stage.group.layers[seen] for seen in stage.group.visible(member)]
                    assert sorted(p.layer for key in taken for p in bundles[key]) == visible
                assert {source for source, _ in taken} <= heard_by(stage, rank)


def heard_by(stage: Stage, rank: int) -> set[int]:
    """Ranks whose attention outputs `rank` has when its feed-forward parts start."""
    if stage.attention_round is None:
        return {rank}
    return {rank} | set(stage.attention_round.sources[rank])


@given(plans(), WORLDS)
def test_a_round_is_where_something_crosses_ranks_and_nowhere_else(plan: Plan, world: int) -> None:
    assignment = assign(plan, world, VOCAB)
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
    assert [round.index for round in rounds] == list(range(len(rounds)))
    assert assignment.rounds == len(rounds)


@given(plans(), WORLDS)
def test_ranks_agree_on_who_sends_to_whom_and_who_counts(plan: Plan, world: int) -> None:
    for round in rounds_of(assign(plan, world, VOCAB)):
        sends = {(source, target) for source in range(world) for target in round.targets(source)}
        receives = {
            (source, target)
            for target, wanted in enumerate(round.sources)
            for source in wanted
            if source != target
        }
        assert sends == receives
        assert sends, "a round in which nothing moves"
        contributing = {source for wanted in round.sources for source in wanted}
        assert round.leader == min(contributing)


@given(st.integers(1, 6), st.integers(6, 400))
def test_head_rows_are_a_partition_of_the_vocabulary_in_rank_order(world: int, vocab: int) -> None:
    rows = assign(Plan.sequential(3), world, vocab).head_rows
    assert [row for part in rows for row in part] == list(range(vocab))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


@given(st.integers(1, 6), st.integers(0, 50))
def test_shards_of_a_layer_are_a_partition_of_its_heads(shards: int, heads: int) -> None:
    parts = [Piece(0, shard, shards).part_of(heads) for shard in range(shards)]
    assert [head for part in parts for head in part] == list(range(heads))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


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
    assert assign(Plan.parse(plan, 30), ranks, 49152).rounds == rounds


@given(plans(), plans(), WORLDS)
def test_a_plan_that_follows_another_has_each_layer_where_it_is_there(
    base: Plan, other: Plan, world: int
) -> None:
    base, other = Plan.covering(base.groups, 24), Plan.covering(other.groups, 24)
    first = assign(base, world, VOCAB)
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
    assignment = assign(plan, world, VOCAB)
    assert follow(plan, assignment) == assignment


def test_plans_of_different_models_cannot_share_ranks() -> None:
    with pytest.raises(PlanError, match="the plans have 3 and 4 layers"):
        follow(Plan.sequential(4), assign(Plan.sequential(3), 2, VOCAB))


def test_no_ranks_and_too_many_are_refused() -> None:
    plan = Plan.sequential(3)
    with pytest.raises(PlanError, match="ranks is 0, but at least 1 rank is needed"):
        assign(plan, 0, VOCAB)
    with pytest.raises(PlanError, match="7 ranks cannot share a vocabulary of 6"):
        assign(plan, 7, 6)
