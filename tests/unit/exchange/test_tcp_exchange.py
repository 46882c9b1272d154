from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.exchange_mesh import (
    descriptors_at_first,
    everyone,
    in_threads,
    open_descriptors,
    socket_pair,
    tcp_mesh,
)

from cqil_dist.assignment import Round, assign
from cqil_dist.errors import ExchangeError, PeerLost, ProtocolError
from cqil_dist.exchange import TcpExchange, framing, sum_in_rank_order
from cqil_dist.plan import Bypass, Plan

WIDTH = 576


def shapes_of(world: int, *shape: int) -> dict[int, tuple[int, ...]]:
    return dict.fromkeys(range(world), shape)


def parts_of(world: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(world)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(world)]


def run(
    exchanges: list[TcpExchange], body: Callable[[TcpExchange], Any], *others: Callable[[], Any]
) -> list[Any]:
    """Run `body` on every rank at the same time."""
    bodies = [lambda exchange=exchange: body(exchange) for exchange in exchanges]
    return in_threads(*bodies, *others)


@pytest.mark.parametrize("spin_s", [0.0, 0.001], ids=["sleeping", "spinning"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_holds_the_same_bits(world: int, dtype: torch.dtype, spin_s: float) -> None:
    parts = parts_of(world, 3, WIDTH, dtype=dtype)
    expected = parts[0].clone()
    for part in parts[1:]:
        expected = expected + part

    def rounds(exchange: TcpExchange) -> list[torch.Tensor]:
        sums = []
        for step in range(3):
            exchange.begin_step(step)
            for index in range(4):
                own = parts[exchange.rank]
                gathered = exchange.gather(everyone(world, index), own, shapes_of(world, 3, WIDTH))
                assert [rank for rank, _ in gathered] == list(range(world))
                assert gathered[exchange.rank][1] is own
                sums.append(sum_in_rank_order(gathered))
        return sums

    with tcp_mesh(world, dtype=dtype, spin_s=spin_s) as exchanges:
        for sums in run(exchanges, rounds):
            assert len(sums) == 12
            assert all(torch.equal(total, expected) for total in sums)


@pytest.mark.parametrize("shape", [(0, 5), (), (1,), (7, 1, 3), (2, 2048)])
def test_any_shape_arrives(shape: tuple[int, ...]) -> None:
    parts = parts_of(2, *shape)

    def once(exchange: TcpExchange) -> None:
        for rank, part in exchange.gather(everyone(2), parts[exchange.rank], shapes_of(2, *shape)):
            assert torch.equal(part, parts[rank])

    with tcp_mesh(2) as exchanges:
        run(exchanges, once)


def test_rounds_of_a_bypass_plan_where_each_rank_needs_others_and_shapes_differ() -> None:
    """Distance bypass on ranks that hold different numbers of members of the group."""
    plan = Plan.span(5, 0, 5, Bypass.parse(2), num_layers=6)
    assignment = assign(plan, 3, vocab_size=99)
    stage = assignment.stages[0]
    assert stage.attention_round is not None
    assert len(set(stage.attention_round.sources)) > 1, "an asymmetric round"
    shapes = {rank: (len(stage.pieces[rank]), 2, WIDTH) for rank in range(3)}
    assert len(set(shapes.values())) > 1
    parts = {rank: torch.randn(shape) for rank, shape in shapes.items()}

    def walk(exchange: TcpExchange) -> None:
        for step in range(20):
            exchange.begin_step(step)
            assert stage.attention_round is not None
            gathered = exchange.gather(stage.attention_round, parts[exchange.rank], shapes)
            assert tuple(r for r, _ in gathered) == stage.attention_round.sources[exchange.rank]
            assert all(torch.equal(part, parts[rank]) for rank, part in gathered)

    with tcp_mesh(3) as exchanges:
        run(exchanges, walk)


def test_a_sender_runs_ahead_and_its_frames_wait_their_turn() -> None:
    """A hand-over: rank 0 has no use for the result, so it does not wait for rank 1."""
    hand_over = [Round(index, ((), (0,))) for index in range(50)]
    done = threading.Event()

    def send(exchange: TcpExchange) -> None:
        for index, round in enumerate(hand_over):
            own = torch.full((1, WIDTH), float(index))
            assert exchange.gather(round, own, shapes_of(2, 1, WIDTH)) == []
        done.set()

    def receive(exchange: TcpExchange) -> None:
        assert done.wait(5), "rank 0 waited for rank 1"
        for index, round in enumerate(hand_over):
            [(rank, part)] = exchange.gather(round, None, shapes_of(2, 1, WIDTH))
            assert rank == 0
            assert torch.equal(part, torch.full((1, WIDTH), float(index)))

    with tcp_mesh(2) as exchanges:
        run(exchanges, lambda exchange: send(exchange) if exchange.rank == 0 else receive(exchange))


def test_a_rank_without_part_in_a_round_neither_sends_nor_waits() -> None:
    pair_round = Round(0, ((0, 1), (0, 1), ()))
    parts = parts_of(3, 4)

    def once(exchange: TcpExchange) -> int:
        own = parts[exchange.rank] if exchange.rank < 2 else None
        return len(exchange.gather(pair_round, own, shapes_of(3, 4)))

    with tcp_mesh(3) as exchanges:
        assert run(exchanges, once) == [2, 2, 0]
        assert exchanges[2].stats.rounds == 0


@pytest.mark.parametrize("world", [2, 3])
def test_megabytes_in_all_directions_at_once(world: int) -> None:
    elements = 2 * 1024 * 1024  # 8 MB, more than sockets buffer
    parts = parts_of(world, elements)

    def exchange_all(exchange: TcpExchange) -> torch.Tensor:
        for index in range(3):
            gathered = exchange.gather(
                everyone(world, index), parts[exchange.rank], shapes_of(world, elements)
            )
        return sum_in_rank_order(gathered)

    with tcp_mesh(world) as exchanges:
        first, *others = run(exchanges, exchange_all)
    assert torch.equal(first, sum_in_rank_order(list(enumerate(parts))))
    assert all(torch.equal(first, other) for other in others)


def test_receive_buffers_are_reused_from_shape_to_shape() -> None:
    shapes = [(4, 8), (4, 8), (2, 3), (1,), (4, 8)]

    def rounds(exchange: TcpExchange) -> None:
        other = 1 - exchange.rank
        addresses = set()
        for index, shape in enumerate(shapes):
            own = torch.full(shape, float(10 * index + exchange.rank))
            gathered = dict(exchange.gather(everyone(2, index), own, shapes_of(2, *shape)))
            assert torch.equal(gathered[other], torch.full(shape, float(10 * index + other)))
            addresses.add(gathered[other].data_ptr())
        assert len(addresses) == 1

    with tcp_mesh(2) as exchanges:
        run(exchanges, rounds)


@pytest.mark.parametrize("spin_s", [0.0, 5.0], ids=["sleeping", "spinning"])
def test_a_closed_peer_is_lost_at_once(spin_s: float) -> None:
    def wait(exchange: TcpExchange) -> float:
        if exchange.rank == 2:
            time.sleep(0.1)
            exchange.close()
            return 0.0
        started = time.monotonic()
        with pytest.raises(PeerLost, match="rank 2") as caught:
            exchange.gather(everyone(3), torch.zeros(4), shapes_of(3, 4))
        assert caught.value.peer == 2
        assert caught.value.address.startswith("127.0.0.1:")
        waited_s = time.monotonic() - started
        with pytest.raises(ExchangeError, match=r"has failed and cannot go on.*lost rank 2"):
            exchange.gather(everyone(3), torch.zeros(4), shapes_of(3, 4))
        return waited_s

    with tcp_mesh(3, spin_s=spin_s) as exchanges:
        assert max(run(exchanges, wait)) < 5


def test_a_peer_that_closes_while_it_is_sent_to_is_lost() -> None:
    hand_over = Round(0, ((), (0,)))

    def hand(exchange: TcpExchange) -> None:
        if exchange.rank == 1:
            time.sleep(0.1)
            exchange.close()
            return
        with pytest.raises(PeerLost, match="rank 1"):
            exchange.gather(hand_over, torch.zeros(1 << 22), shapes_of(2, 1 << 22))

    with tcp_mesh(2) as exchanges:
        run(exchanges, hand)


def test_a_stuck_peer_is_lost_at_the_deadline() -> None:
    with tcp_mesh(2, deadline_s=0.3) as exchanges:
        exchanges[0].begin_step(7)
        started = time.monotonic()
        with pytest.raises(PeerLost, match=r"rank 1 .*step 7, round 0 was not done within 0\.3 s"):
            exchanges[0].gather(everyone(2), torch.zeros(4), shapes_of(2, 4))
        assert 0.3 <= time.monotonic() - started < 5


def test_a_peer_that_takes_nothing_is_lost_at_the_deadline() -> None:
    with (
        tcp_mesh(2, deadline_s=0.3) as exchanges,
        pytest.raises(PeerLost, match=r"ranks \[1\] take nothing"),
    ):
        exchanges[0].gather(Round(0, ((), (0,))), torch.zeros(1 << 22), shapes_of(2, 1 << 22))


@pytest.mark.parametrize(
    ("step", "index", "shape", "sent"),
    [
        (4, 0, (2, 8), r"epoch 0, step 4, round 0, torch.float32 of shape \(2, 8\)"),
        (3, 1, (2, 8), r"epoch 0, step 3, round 1, torch.float32 of shape \(2, 8\)"),
        (3, 0, (1, 8), r"epoch 0, step 3, round 0, torch.float32 of shape \(1, 8\)"),
        (3, 0, (2, 9), r"epoch 0, step 3, round 0, torch.float32 of shape \(2, 9\)"),
        (3, 0, (16,), r"epoch 0, step 3, round 0, torch.float32 of shape \(16,\)"),
        (300, 0, (2, 8), r"epoch 0, step 300, round 0, torch.float32 of shape \(2, 8\)"),
    ],
    ids=["step", "round", "smaller", "larger", "dimensions", "longer head"],
)
def test_another_step_round_or_shape_is_refused_naming_both(
    step: int, index: int, shape: tuple[int, ...], sent: str
) -> None:
    def once(exchange: TcpExchange) -> None:
        if exchange.rank == 1:
            exchange.begin_step(step)
            exchange.gather(Round(index, ((1,), ())), torch.zeros(shape), {1: shape})
            return
        exchange.begin_step(3)
        expected = r"epoch 0, step 3, round 0, torch.float32 of shape \(2, 8\)"
        with pytest.raises(ProtocolError, match=f"rank 1 at .*sent {sent} where {expected}"):
            exchange.gather(Round(0, ((1,), ())), None, {1: (2, 8)})

    with tcp_mesh(2) as exchanges:
        run(exchanges, once)


def test_another_epoch_and_another_dtype_are_refused() -> None:
    for options in ({"epoch": 2}, {"dtype": torch.float16}):
        with socket_pair() as (near, far):
            settings: dict[str, Any] = {"dtype": torch.bfloat16, "epoch": 1, "deadline_s": 5.0}
            ours = TcpExchange(0, {1: near}, {1: "far:1"}, device="cpu", max_bytes=99, **settings)
            settings |= options
            theirs = TcpExchange(1, {0: far}, {0: "near:0"}, device="cpu", max_bytes=99, **settings)
            own = torch.zeros(4, dtype=settings["dtype"])
            theirs.gather(Round(0, ((1,), ())), own, {1: (4,)})
            with pytest.raises(ProtocolError, match="rank 1 at far:1 sent epoch"):
                ours.gather(Round(0, ((1,), ())), None, {1: (4,)})
            ours.close()
            theirs.close()


def test_bytes_that_are_no_frame_are_refused() -> None:
    for garbage in (b"\xff" * 100, b"\x00" * 100, b"\x05", framing.encode_head({"a": 1}, 4)):
        with socket_pair() as (near, far):
            exchange = TcpExchange(0, {1: near}, {1: "far:1"}, torch.float32, "cpu", 99)
            far.sendall(garbage)
            with pytest.raises(ProtocolError, match=r"bytes that are no frame .* where epoch 0"):
                exchange.gather(Round(0, ((1,), ())), None, {1: (4,)})
            exchange.close()


def test_a_frame_that_comes_in_pieces_is_put_together_and_never_read_past() -> None:
    """Every byte alone, and the next frame right behind."""
    frames = b"".join(
        framing.encode_head([0, 0, index, 0, 4], 16) + bytes(framing.memory_of(torch.ones(4)))
        for index in range(2)
    )

    def trickle() -> None:
        for byte in frames:
            far.sendall(bytes([byte]))

    def receive() -> None:
        for index in range(2):
            [(_, part)] = exchange.gather(Round(index, ((1,), ())), None, {1: (4,)})
            assert torch.equal(part, torch.ones(4))

    with socket_pair() as (near, far):
        exchange = TcpExchange(0, {1: near}, {1: "far:1"}, torch.float32, "cpu", 99, deadline_s=5)
        in_threads(trickle, receive)
        exchange.close()


@pytest.mark.parametrize("spin_s", [0.0, 5.0], ids=["sleeping", "spinning"])
def test_close_from_another_thread_unblocks_a_gather(spin_s: float) -> None:
    with tcp_mesh(2, spin_s=spin_s) as exchanges:
        threading.Timer(0.1, exchanges[0].close).start()
        started = time.monotonic()
        with pytest.raises(ExchangeError, match="rank 0 has closed its exchange"):
            exchanges[0].gather(everyone(2), torch.zeros(4), shapes_of(2, 4))
        assert time.monotonic() - started < 5
        exchanges[0].close()
        with pytest.raises(ExchangeError, match="rank 0 has closed its exchange"):
            exchanges[0].gather(everyone(2), torch.zeros(4), shapes_of(2, 4))


def test_close_gives_every_descriptor_back() -> None:
    before = descriptors_at_first()
    with tcp_mesh(3) as exchanges:
        assert open_descriptors() == before + 6
    assert open_descriptors() == before
    del exchanges  # held until now, so that it was not the garbage collector that closed them


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (None, "passed no partial result"),
        (torch.zeros(2, 3, dtype=torch.float64), "float64"),
        (torch.zeros(3, 2).t(), "contiguous"),
        (torch.zeros(2, 300), "bound of 1024"),
    ],
    ids=["none", "dtype", "strides", "size"],
)
def test_what_cannot_be_sent_is_refused(own: torch.Tensor | None, reason: str) -> None:
    with (
        tcp_mesh(2, max_bytes=1024) as exchanges,
        pytest.raises(ExchangeError, match=reason),
    ):
        exchanges[0].gather(everyone(2), own, shapes_of(2, 2, 3))


def test_more_than_the_bound_is_not_received() -> None:
    with (
        tcp_mesh(2, max_bytes=1024) as exchanges,
        pytest.raises(ExchangeError, match="1028 bytes is over"),
    ):
        exchanges[0].gather(Round(0, ((1,), ())), None, {1: (257,)})


def test_stats_count_each_round_once_over_all_ranks() -> None:
    rounds = [
        everyone(3, 0),
        Round(1, ((), (1, 2), (1, 2))),  # rank 0 has no part
        Round(2, ((), (0,), ())),  # a hand-over
    ]

    def walk(exchange: TcpExchange) -> None:
        for step in range(5):
            exchange.begin_step(step)
            for round in rounds:
                contributes = any(exchange.rank in wanted for wanted in round.sources)
                own = torch.zeros(4) if contributes else None
                exchange.gather(round, own, shapes_of(3, 4))

    with tcp_mesh(3) as exchanges:
        run(exchanges, walk)
        stats = [exchange.stats.snapshot() for exchange in exchanges]
    assert [s["rounds_led"] for s in stats] == [10, 5, 0]
    assert [s["rounds"] for s in stats] == [10, 15, 10]
    frame = len(framing.encode_head([0, 0, 0, 0, 4], 16)) + 16
    assert [s["bytes_sent"] for s in stats] == [15 * frame, 15 * frame, 15 * frame]
    assert [s["bytes_received"] for s in stats] == [10 * frame, 20 * frame, 15 * frame]
    # Waits are those of rounds that received from a peer.
    assert [s["round"] for s in stats] == [[0] * 5, [0, 1, 2] * 5, [0, 1] * 5]
    assert stats[0]["step"] == [0, 1, 2, 3, 4]
    for snapshot in stats:
        waits = snapshot["wait_s"]
        assert isinstance(waits, list)
        assert all(0 < wait_s < 10 for wait_s in waits)
