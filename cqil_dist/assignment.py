"""Who computes what, and who must hear of it: a plan spread over ranks.

Pure arithmetic on a plan: no tensors, no sockets. Every rank walks the same stages in the same
order; a stage says which pieces each rank computes and, for each of its (at most two) exchanges,
whose partial results each rank needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from cqil_dist.costs import Costs, ModelShape, Piece, evenly
from cqil_dist.errors import PlanError
from cqil_dist.plan import Group, Plan

UNGROUPED = ("own", "shard")
"""What may become of layers that stand alone: each owned by one rank, or split over all of them."""

Bundle = tuple[Piece, ...]
"""Pieces of one rank and stage that are computed as one wide product."""


@dataclass(frozen=True)
class Round:
    """An exchange of partial results, as every rank sees it.

    Attributes:
        index: the round's number within a step, counted from 0.
        sources: for each rank, the ranks whose partial results it needs, in rank order, itself
            included where it contributes; empty where it has no use for the result.
        tensor_counts: for each rank, how many tensors of tokens by model width it contributes.
    """

    index: int
    sources: tuple[tuple[int, ...], ...]
    tensor_counts: tuple[int, ...]

    def targets(self, rank: int) -> tuple[int, ...]:
        """Return the other ranks that need what `rank` contributes."""
        return tuple(r for r, wanted in enumerate(self.sources) if rank in wanted and r != rank)

    @property
    def leader(self) -> int:
        """Return the lowest contributing rank: only it counts the round, so sums count it once."""
        return min(source for wanted in self.sources for source in wanted)


@dataclass(frozen=True)
class Stage:
    """A group of the plan on its ranks.

    Attributes:
        group: the group of layers.
        pieces: for each rank, what it computes, in layer order.
        attention_round: None where every feed-forward part finds the attention outputs that it
            takes on its own rank.
        output_round: None where the one rank that computed the output is the only one that needs
            it next.
    """

    group: Group
    pieces: tuple[tuple[Piece, ...], ...]
    attention_round: Round | None = None
    output_round: Round | None = None

    @property
    def workers(self) -> tuple[int, ...]:
        """Return the ranks that compute a piece of this stage, in rank order."""
        return tuple(rank for rank, pieces in enumerate(self.pieces) if pieces)

    @property
    def residual_owner(self) -> int:
        """Return the rank whose partial result includes the residual, so it enters the sum once."""
        return self.workers[0]

    def attention_bundles(self, rank: int) -> tuple[Bundle, ...]:
        """Return the pieces of `rank` that have heads, bundled by who sees their outputs.

        A bundle's attention outputs are summed where they are computed: one wide product, and one
        tensor to send.
        """
        with_heads = [piece for piece in self.pieces[rank] if piece.heads]
        return _bundle(with_heads, self._seen_by)

    def feed_forward_bundles(self, rank: int) -> tuple[Bundle, ...]:
        """Return the pieces of `rank` that have columns, bundled by the input they take."""
        with_columns = [piece for piece in self.pieces[rank] if piece.columns]
        return _bundle(with_columns, self._visible_layers)

    def attention_sources(self, rank: int) -> tuple[int, ...]:
        """Return the ranks with attention outputs that a feed-forward on `rank` sees, in order."""
        with_columns = [piece for piece in self.pieces[rank] if piece.columns]
        seen = frozenset[int]().union(*map(self._visible_layers, with_columns))
        return tuple(
            source
            for source, held in enumerate(self.pieces)
            if any(piece.heads and piece.layer in seen for piece in held)
        )

    def feed_forward_sees(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Return the attention outputs that each feed-forward bundle of `rank` takes.

        They are numbered as they lie on `rank` after the attention round: bundle by bundle of the
        ranks that it gathers from, in rank order.
        """
        sources = self.attention_sources(rank)
        gathered = [bundle for source in sources for bundle in self.attention_bundles(source)]
        return tuple(
            tuple(
                index
                for index, seen in enumerate(gathered)
                if seen[0].layer in self._visible_layers(bundle[0])
            )
            for bundle in self.feed_forward_bundles(rank)
        )

    def _visible_layers(self, piece: Piece) -> frozenset[int]:
        members = self.group.visible(self.group.layers.index(piece.layer))
        return frozenset(self.group.layers[member] for member in members)

    def _seen_by(self, piece: Piece) -> frozenset[int]:
        member = self.group.layers.index(piece.layer)
        return frozenset(j for j in range(self.group.size) if member in self.group.visible(j))


@dataclass(frozen=True)
class Assignment:
    """A plan on `world` ranks: the stages in order, and each rank's rows of the vocabulary head."""

    plan: Plan
    world: int
    stages: tuple[Stage, ...]
    head_rows: tuple[range, ...]

    @property
    def entry_ranks(self) -> tuple[int, ...]:
        """Return the ranks that need the embedded tokens."""
        return self.stages[0].workers

    @property
    def rounds(self) -> int:
        """Return how many exchanges a token takes part in, from embedding to logits."""
        return sum(
            (stage.attention_round is not None) + (stage.output_round is not None)
            for stage in self.stages
        )

    def layers_of(self, rank: int) -> tuple[int, ...]:
        """Return the layers of which `rank` holds a piece, in order."""
        return tuple(piece.layer for stage in self.stages for piece in stage.pieces[rank])

    @cached_property
    def split_layers(self) -> frozenset[int]:
        """Return the layers of which several ranks hold a piece."""
        held = Counter(layer for rank in range(self.world) for layer in self.layers_of(rank))
        return frozenset(layer for layer, ranks in held.items() if ranks > 1)

    def latency_us(self, costs: Costs) -> float:
        """Predict the microseconds of a decoded token: a stage waits for its slowest rank."""
        computed = sum(_stage_us(stage, costs) for stage in self.stages)
        return computed + self.rounds * costs.link_us + costs.head_us / self.world


def assign(
    plan: Plan, world: int, shape: ModelShape, ungrouped: str = "own", block: int = 1
) -> Assignment:
    """Spread a plan over `world` ranks.

    A concurrent group goes to as many ranks as it has members, or to all of them with several
    members each; the least loaded ranks take the larger shares. Every rank takes an equal share of
    the vocabulary.

    Args:
        shape: of the model.
        ungrouped: "own" gives each layer that stands alone to one rank, in contiguous runs, since
            only a change of owner costs an exchange, and so that all ranks hold about the same
            number of layers. "shard" splits each of them over all ranks (tensor parallelism): two
            exchanges a layer, one where its bypass is "parallel".
        block: feed-forward columns are cut at multiples of this many, a weight format's group.

    Raises:
        PlanError: no ranks, more ranks than rows in the vocabulary head, or another policy.
    """
    if ungrouped not in UNGROUPED:
        raise PlanError(f"ungrouped is {ungrouped!r} but must be one of {', '.join(UNGROUPED)}")
    if world < 1:
        raise PlanError(f"ranks is {world}, but at least 1 rank is needed")
    if world > shape.vocab_size:
        raise PlanError(f"{world} ranks cannot share a vocabulary of {shape.vocab_size}")
    load = [0] * world
    shares = [
        _concurrent_share(group, load, shape) if group.size > 1 else None for group in plan.groups
    ]
    if ungrouped == "own":
        owners = _single_owners(plan, load)
        alone = {layer: _owned(shape.whole(layer), owners[layer], world) for layer in owners}
    else:
        alone = {
            group.layers[0]: _sharded(group, world, shape, block)
            for group in plan.groups
            if group.size == 1
        }
    pieces = [
        share or alone[group.layers[0]] for group, share in zip(plan.groups, shares, strict=True)
    ]
    head_rows = tuple(evenly(shape.vocab_size, world))
    return Assignment(plan, world, _stages(plan, pieces, world), head_rows)


def follow(plan: Plan, base: Assignment) -> Assignment:
    """Spread another plan of the same model over the ranks of `base`, each layer where it is there.

    A layer that is split over ranks there is computed as it lies, also within a group. A rank that
    computes single layers of each group in both plans needs no more memory for the second.

    Raises:
        PlanError: the plans have different numbers of layers.
    """
    if plan.num_layers != base.plan.num_layers:
        raise PlanError(
            f"the plans have {base.plan.num_layers} and {plan.num_layers} layers, but plans over "
            "the same ranks are of one model"
        )
    held = {
        (rank, piece.layer): piece
        for stage in base.stages
        for rank, pieces in enumerate(stage.pieces)
        for piece in pieces
    }
    pieces = [
        tuple(
            tuple(held[rank, layer] for layer in group.layers if (rank, layer) in held)
            for rank in range(base.world)
        )
        for group in plan.groups
    ]
    return Assignment(plan, base.world, _stages(plan, pieces, base.world), base.head_rows)


def _concurrent_share(
    group: Group, load: list[int], shape: ModelShape
) -> tuple[tuple[Piece, ...], ...]:
    """Give each rank contiguous members; update `load`, the layers each rank holds so far."""
    world = len(load)
    base, larger = divmod(group.size, world)
    favoured = set(sorted(range(world), key=lambda rank: (load[rank], rank))[:larger])
    share: list[tuple[Piece, ...]] = []
    first = 0
    for rank in range(world):
        count = base + (rank in favoured)
        share.append(tuple(map(shape.whole, group.layers[first : first + count])))
        load[rank] += count
        first += count
    return tuple(share)


def _single_owners(plan: Plan, load: list[int]) -> dict[int, int]:
    """Choose the owner of each lone layer: long runs first, cut only where a rank is full."""
    capacity = _capacities(plan.num_layers, load)
    owners: dict[int, int] = {}
    for run in sorted(_single_runs(plan), key=len, reverse=True):
        remaining = list(run)
        while remaining:
            whole = [r for r, free in enumerate(capacity) if free >= len(remaining)]
            # The tightest rank that takes the whole run leaves room for later, else the roomiest.
            if whole:
                rank = min(whole, key=lambda r: (capacity[r], r))
            else:
                rank = max(range(len(load)), key=lambda r: (capacity[r], -r))
            taken = remaining[: capacity[rank]]
            owners |= dict.fromkeys(taken, rank)
            capacity[rank] -= len(taken)
            remaining = remaining[len(taken) :]
    return owners


def _owned(piece: Piece, owner: int, world: int) -> tuple[tuple[Piece, ...], ...]:
    return tuple((piece,) if rank == owner else () for rank in range(world))


def _sharded(
    group: Group, world: int, shape: ModelShape, block: int
) -> tuple[tuple[Piece, ...], ...]:
    """Split one layer over all ranks; ranks for which nothing is left compute nothing."""
    parts = shape.split(group.layers[0], world, block, together=not group.visible(0))
    return tuple((part,) if part.heads or part.columns else () for part in parts)


def _stage_us(stage: Stage, costs: Costs) -> float:
    attention = [costs.attention_us(pieces) for pieces in stage.pieces]
    feed_forward = [costs.feed_forward_us(pieces) for pieces in stage.pieces]
    if stage.attention_round is not None:
        return max(attention) + max(feed_forward)
    return max(a + f for a, f in zip(attention, feed_forward, strict=True))


def _capacities(num_layers: int, load: Sequence[int]) -> list[int]:
    """Return how many layers each rank may still take for final loads as even as can be."""
    final = list(load)
    for _ in range(num_layers - sum(load)):
        final[final.index(min(final))] += 1
    return [after - before for after, before in zip(final, load, strict=True)]


def _single_runs(plan: Plan) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for group in plan.groups:
        if group.size == 1:
            runs[-1].append(group.layers[0])
        else:
            runs.append([])
    return [run for run in runs if run]


def _stages(
    plan: Plan, pieces: Sequence[tuple[tuple[Piece, ...], ...]], world: int
) -> tuple[Stage, ...]:
    """Derive each stage's exchanges from who computes it and who needs its output next."""
    stages: list[Stage] = []
    rounds = 0
    for index, (group, share) in enumerate(zip(plan.groups, pieces, strict=True)):
        stage = Stage(group, share)
        if index + 1 < plan.depth:
            needing = {rank for rank in range(world) if pieces[index + 1][rank]}
        else:
            needing = set(range(world))  # the vocabulary head is shared by all ranks
        sources = tuple(stage.attention_sources(rank) for rank in range(world))
        if _crosses_ranks(sources):
            bundles = tuple(len(stage.attention_bundles(rank)) for rank in range(world))
            stage = replace(stage, attention_round=Round(rounds, sources, bundles))
            rounds += 1
        sources = tuple(stage.workers if rank in needing else () for rank in range(world))
        if _crosses_ranks(sources):
            one_each = tuple(int(bool(own)) for own in share)
            stage = replace(stage, output_round=Round(rounds, sources, one_each))
            rounds += 1
        stages.append(stage)
    return tuple(stages)


def _bundle(pieces: Sequence[Piece], key: Callable[[Piece], frozenset[int]]) -> tuple[Bundle, ...]:
    return tuple(tuple(run) for _, run in groupby(pieces, key))


def _crosses_ranks(sources: tuple[tuple[int, ...], ...]) -> bool:
    return any(set(wanted) - {rank} for rank, wanted in enumerate(sources))
