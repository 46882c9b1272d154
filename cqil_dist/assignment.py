"""Who computes what, and who must hear of it: a plan spread over ranks.

Pure arithmetic on a plan: no tensors, no sockets. Every rank walks the same stages in the same
order; a stage says which pieces each rank computes and, for each of its (at most two) exchanges,
whose partial results each rank needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from cqil_dist.errors import PlanError
from cqil_dist.plan import Group, Plan


@dataclass(frozen=True)
class Piece:
    """Shard `shard` of `shards` of one layer: its heads and feed-forward columns."""

    layer: int
    shard: int = 0
    shards: int = 1

    def part_of(self, total: int) -> range:
        """This shard's part of `total` heads or columns; parts may be uneven."""
        return _split(total, self.shards)[self.shard]


@dataclass(frozen=True)
class Round:
    """One exchange of partial results, as every rank sees it.

    `sources[r]` are the ranks whose partial results rank r needs, in rank order, itself included
    where it contributes; empty where rank r has no use for the result. `index` numbers the rounds
    of a step from 0.
    """

    index: int
    sources: tuple[tuple[int, ...], ...]

    def targets(self, rank: int) -> tuple[int, ...]:
        """The other ranks that need what `rank` contributes."""
        return tuple(r for r, wanted in enumerate(self.sources) if rank in wanted and r != rank)

    @property
    def leader(self) -> int:
        """Lowest contributing rank: it alone counts the round, so that sums count it once."""
        return min(source for wanted in self.sources for source in wanted)


@dataclass(frozen=True)
class Stage:
    """One group of the plan on its ranks.

    `pieces[r]` is what rank r computes, in layer order. `attention_round` is None where every
    feed-forward part finds the attention outputs it needs on its own rank, and `output_round` is
    None where the one rank that computed the output is the only one that needs it.
    """

    group: Group
    pieces: tuple[tuple[Piece, ...], ...]
    attention_round: Round | None
    output_round: Round | None

    @property
    def workers(self) -> tuple[int, ...]:
        """Ranks that compute a piece of this stage, in rank order."""
        return tuple(rank for rank, pieces in enumerate(self.pieces) if pieces)

    @property
    def carrier(self) -> int:
        """The rank whose partial result carries the residual, so that it enters the sum once."""
        return self.workers[0]

    def attention_bundles(self, rank: int) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of `rank`, those together whose attention outputs are only ever used together.

        A bundle's attention outputs are summed where they are computed: one wide product, and one
        tensor to send.
        """
        return _bundle(self.pieces[rank], self._seen_by)

    def feed_forward_bundles(self, rank: int) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of `rank`, those together whose feed-forward parts take the same input."""
        return _bundle(self.pieces[rank], self._visible_layers)

    def attention_inputs(self, piece: Piece) -> tuple[tuple[int, int], ...]:
        """Attention bundles that the feed-forward part of `piece` takes: (rank, bundle index)."""
        visible = self._visible_layers(piece)
        return tuple(
            (rank, index)
            for rank in self.workers
            for index, bundle in enumerate(self.attention_bundles(rank))
            if bundle[0].layer in visible
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
        """Ranks that need the embedded tokens."""
        return self.stages[0].workers

    @property
    def rounds(self) -> int:
        """Exchanges a token takes part in, from embedding to logits."""
        return sum(
            (stage.attention_round is not None) + (stage.output_round is not None)
            for stage in self.stages
        )

    def layers_of(self, rank: int) -> tuple[int, ...]:
        """Layers of which `rank` holds a piece, in order."""
        return tuple(piece.layer for stage in self.stages for piece in stage.pieces[rank])


def assign(plan: Plan, world: int, vocab_size: int) -> Assignment:
    """Spread a plan over `world` ranks so that all hold about the same number of layers.

    A concurrent group goes to as many ranks as it has members, or to all of them with several
    members each; the least loaded ranks take the larger shares. Layers that stand alone are owned
    by one rank, in contiguous runs, because only a change of owner costs an exchange. Every rank
    takes an equal share of the vocabulary.

    Raises:
        PlanError: no ranks, or more ranks than rows in the vocabulary head.
    """
    if world < 1:
        raise PlanError(f"ranks is {world}, but at least 1 rank is needed")
    if world > vocab_size:
        raise PlanError(f"{world} ranks cannot share a vocabulary of {vocab_size}")
    load = [0] * world
    shares = [_concurrent_share(group, load) if group.size > 1 else None for group in plan.groups]
    owners = _single_owners(plan, load)
    pieces = [
        share
        or tuple(
            (Piece(g.layers[0]),) if rank == owners[g.layers[0]] else () for rank in range(world)
        )
        for g, share in zip(plan.groups, shares, strict=True)
    ]
    return Assignment(plan, world, _stages(plan, pieces, world), _split(vocab_size, world))


def follow(plan: Plan, base: Assignment) -> Assignment:
    """Spread another plan of the same model over the ranks of `base`, each layer where it is there.

    A rank that computes single layers of each group in both needs no more memory for the second.

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


def _concurrent_share(group: Group, load: list[int]) -> tuple[tuple[Piece, ...], ...]:
    """Contiguous members to each rank; updates `load`, the layers each rank holds so far."""
    world = len(load)
    base, larger = divmod(group.size, world)
    favoured = set(sorted(range(world), key=lambda rank: (load[rank], rank))[:larger])
    share: list[tuple[Piece, ...]] = []
    first = 0
    for rank in range(world):
        count = base + (rank in favoured)
        share.append(tuple(Piece(layer) for layer in group.layers[first : first + count]))
        load[rank] += count
        first += count
    return tuple(share)


def _single_owners(plan: Plan, load: list[int]) -> dict[int, int]:
    """Owner of each layer that stands alone: long runs first, cut only where a rank is full."""
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


def _capacities(num_layers: int, load: Sequence[int]) -> list[int]:
    """Layers each rank may still take so that the final loads are as even as they can be."""
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
        workers = tuple(rank for rank in range(world) if share[rank])
        if index + 1 < plan.depth:
            needing = {rank for rank in range(world) if pieces[index + 1][rank]}
        else:
            needing = set(range(world))  # the vocabulary head is shared by all ranks
        attention_round = output_round = None
        sources = tuple(_attention_sources(group, share, rank) for rank in range(world))
        if _crosses_ranks(sources):
            attention_round = Round(rounds, sources)
            rounds += 1
        sources = tuple(workers if rank in needing else () for rank in range(world))
        if _crosses_ranks(sources):
            output_round = Round(rounds, sources)
            rounds += 1
        stages.append(Stage(group, share, attention_round, output_round))
    return tuple(stages)


def _attention_sources(
    group: Group, share: tuple[tuple[Piece, ...], ...], rank: int
) -> tuple[int, ...]:
    """Ranks holding an attention output that a feed-forward part on `rank` takes as input."""
    needed = {
        group.layers[seen]
        for piece in share[rank]
        for seen in group.visible(group.layers.index(piece.layer))
    }
    return tuple(
        source for source, held in enumerate(share) if any(piece.layer in needed for piece in held)
    )


def _bundle(
    pieces: tuple[Piece, ...], key: Callable[[Piece], frozenset[int]]
) -> tuple[tuple[Piece, ...], ...]:
    return tuple(tuple(run) for _, run in groupby(pieces, key))


def _crosses_ranks(sources: tuple[tuple[int, ...], ...]) -> bool:
    return any(set(wanted) - {rank} for rank, wanted in enumerate(sources))


def _split(total: int, parts: int) -> tuple[range, ...]:
    bounds = [total * part // parts for part in range(parts + 1)]
    return tuple(range(first, last) for first, last in pairwise(bounds))
