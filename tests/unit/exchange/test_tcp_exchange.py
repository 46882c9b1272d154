from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import reduce
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
from cqil_dist.costs import ModelShape
from cqil_dist.errors import ExchangeError, PeerLost, ProtocolError
from cqil_dist.exchange import TcpExchange, framing
from cqil_dist.plan import Bypass, Plan

WIDTH = 576


def parts_of(world: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(world)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(world)]


def run(
    exchanges: list[TcpExchange], body: Callable[[TcpExchange], Any], *others: Callable[[], Any]
) -> list[Any]:
    """Run `body` on every rank at the same time."""
    bodies = [lambda exchange=exchange: body(exchange) for exchange in exchanges]
    return in_threads(*bodies, *others)


def hand_over(index: int = 0) -> Round:
    """A round in which rank 0 gives rank 1 a tensor, and has no use for it itself."""
    return Round(index, ((), (0,)), (1, 0))


def taken_from_1(index: int = 0, tensors: int = 1) -> Round:
    """A round in which rank 0 takes tensors from rank 1."""
    return Round(index, ((1,), ()), (0, tensors))


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
            exchange.begin_step(step, 3)
            for index in range(0, 8, 2):
                own = parts[exchange.rank]
                gathered = exchange.gather(everyone(world, index), own)
                assert gathered is not None
                assert torch.equal(gathered.view(world, 3, WIDTH), torch.stack(parts))
                total = exchange.sum(everyone(world, index + 1), own)
                assert total is not None
                sums.append(total)
        return sums

    with tcp_mesh(world, dtype=dtype, spin_s=spin_s) as exchanges:
        for sums in run(exchanges, rounds):
            assert len(sums) == 12
            assert all(torch.equal(total, expected) for total in sums)


def test_without_a_round_a_rank_has_what_it_had() -> None:
    own = torch.randn(2, 1, WIDTH)
    with tcp_mesh(1) as (exchange,):
        exchange.begin_step(0, 1)
        assert exchange.gather(None, own) is own
        assert exchange.sum(None, own[0]) is not None
        assert exchange.gather(None, None) is None
        assert exchange.stats.rounds == 0


def test_a_sum_stays_valid_when_the_next_round_overwrites_the_buffer() -> None:
    """Even the sum of a single part is a copy of what was received."""

    def walk(exchange: TcpExchange) -> None:
        exchange.begin_step(0, 1)
        first = exchange.sum(taken_from_1(0), torch.ones(1, WIDTH) if exchange.rank else None)
        second = exchange.sum(taken_from_1(1), torch.zeros(1, WIDTH) if exchange.rank else None)
        if exchange.rank == 0:
            assert first is not None
            assert second is not None
            assert torch.equal(first, torch.ones(1, WIDTH))
            assert torch.equal(second, torch.zeros(1, WIDTH))

    with tcp_mesh(2) as exchanges:
        run(exchanges, walk)


@pytest.mark.parametrize(("tokens", "width"), [(0, 5), (1, 1), (7, 3), (2, 2048)])
def test_any_number_of_tokens_and_width_arrives(tokens: int, width: int) -> None:
    parts = parts_of(2, tokens, width)

    def once(exchange: TcpExchange) -> None:
        exchange.begin_step(0, tokens)
        gathered = exchange.gather(everyone(2), parts[exchange.rank])
        assert gathered is not None
        assert torch.equal(gathered, torch.stack(parts))

    with tcp_mesh(2, width=width) as exchanges:
        run(exchanges, once)


def test_rounds_of_a_bypass_plan_where_each_rank_needs_others_and_shapes_differ() -> None:
    """The rounds of a bypass by distance, on ranks with different numbers of a group's members."""
    plan = Plan.span(5, 0, 5, Bypass.parse(2), num_layers=6)
    stage = assign(plan, 3, ModelShape(WIDTH, 2, 2, 8, 16, 99)).stages[0]
    attention = stage.attention_round
    assert attention is not None
    assert len(set(attention.sources)) > 1, "an asymmetric round"
    assert len(set(attention.tensor_counts)) > 1
    parts = [torch.randn(count, 2, WIDTH) for count in attention.tensor_counts]

    def walk(exchange: TcpExchange) -> None:
        for step in range(20):
            exchange.begin_step(step, 2)
            gathered = exchange.gather(attention, parts[exchange.rank])
            assert gathered is not None
            wanted = [parts[source] for source in attention.sources[exchange.rank]]
            assert torch.equal(gathered, torch.cat(wanted))

    with tcp_mesh(3) as exchanges:
        run(exchanges, walk)


def test_a_sender_runs_ahead_and_its_frames_wait_their_turn() -> None:
    """In a hand-over rank 0 has no use for the result, so it does not wait for rank 1."""
    done = threading.Event()

    def send(exchange: TcpExchange) -> None:
        exchange.begin_step(0, 1)
        for index in range(50):
            own = torch.full((1, WIDTH), float(index))
            assert exchange.gather(hand_over(index), own) is None
        done.set()

    def receive(exchange: TcpExchange) -> None:
        exchange.begin_step(0, 1)
        assert done.wait(5), "rank 0 waited for rank 1"
        for index in range(50):
            gathered = exchange.gather(hand_over(index), None)
            assert gathered is not None
            assert torch.equal(gathered, torch.full((1, 1, WIDTH), float(index)))

    with tcp_mesh(2) as exchanges:
        run(exchanges, lambda exchange: send(exchange) if exchange.rank == 0 else receive(exchange))


def test_a_rank_without_part_in_a_round_neither_sends_nor_waits() -> None:
    pair_round = Round(0, ((0, 1), (0, 1), ()), (1, 1, 0))
    parts = parts_of(3, 1, 4)

    def once(exchange: TcpExchange) -> int:
        exchange.begin_step(0, 1)
        gathered = exchange.gather(pair_round, parts[exchange.rank] if exchange.rank < 2 else None)
        return 0 if gathered is None else len(gathered)

    with tcp_mesh(3, width=4) as exchanges:
        assert run(exchanges, once) == [2, 2, 0]
        assert exchanges[2].stats.rounds == 0


@pytest.mark.parametrize("world", [2, 3])
def test_megabytes_in_all_directions_at_once(world: int) -> None:
    tokens, width = 2048, 1024  # 8 MB, more than sockets buffer
    parts = parts_of(world, tokens, width)

    def exchange_all(exchange: TcpExchange) -> torch.Tensor:
        exchange.begin_step(0, tokens)
        for index in range(3):
            total = exchange.sum(everyone(world, index), parts[exchange.rank])
        assert total is not None
        return total

    with tcp_mesh(world, width=width) as exchanges:
        first, *others = run(exchanges, exchange_all)
    assert torch.equal(first, reduce(torch.add, parts))
    assert all(torch.equal(first, other) for other in others)


def test_the_gather_buffer_is_reused_from_step_to_step() -> None:
    def rounds(exchange: TcpExchange) -> None:
        addresses = set()
        for step, tokens in enumerate([4, 4, 2, 1, 4]):
            exchange.begin_step(step, tokens)
            parts = [torch.full((tokens, 8), float(10 * step + rank)) for rank in range(2)]
            gathered = exchange.gather(everyone(2), parts[exchange.rank])
            assert gathered is not None
            assert torch.equal(gathered, torch.stack(parts))
            addresses.add(gathered.data_ptr())
        assert len(addresses) == 1

    with tcp_mesh(2, width=8) as exchanges:
        run(exchanges, rounds)


@pytest.mark.parametrize("spin_s", [0.0, 5.0], ids=["sleeping", "spinning"])
def test_a_closed_peer_is_lost_at_once(spin_s: float) -> None:
    def wait(exchange: TcpExchange) -> float:
        if exchange.rank == 2:
            time.sleep(0.1)
            exchange.close()
            return 0.0
        exchange.begin_step(0, 1)
        started = time.monotonic()
        with pytest.raises(PeerLost, match="rank 2") as caught:
            exchange.gather(everyone(3), torch.zeros(1, WIDTH))
        assert caught.value.peer == 2
        assert caught.value.address.startswith("127.0.0.1:")
        waited_s = time.monotonic() - started
        with pytest.raises(ExchangeError, match=r"has failed and cannot go on.*lost rank 2"):
            exchange.gather(everyone(3), torch.zeros(1, WIDTH))
        return waited_s

    with tcp_mesh(3, spin_s=spin_s) as exchanges:
        assert max(run(exchanges, wait)) < 5


def test_a_peer_that_closes_while_it_is_sent_to_is_lost() -> None:
    def hand(exchange: TcpExchange) -> None:
        if exchange.rank == 1:
            time.sleep(0.1)
            exchange.close()
            return
        exchange.begin_step(0, 4096)
        with pytest.raises(PeerLost, match="rank 1"):
            exchange.gather(hand_over(), torch.zeros(4096, 1024))

    with tcp_mesh(2, width=1024) as exchanges:
        run(exchanges, hand)


def test_a_stuck_peer_is_lost_at_the_deadline() -> None:
    with tcp_mesh(2, deadline_s=0.3) as exchanges:
        exchanges[0].begin_step(7, 1)
        started = time.monotonic()
        with pytest.raises(PeerLost, match=r"rank 1 .*step 7, round 0 was not done within 0\.3 s"):
            exchanges[0].gather(everyone(2), torch.zeros(1, WIDTH))
        assert 0.3 <= time.monotonic() - started < 5


def test_a_peer_that_takes_nothing_is_lost_at_the_deadline() -> None:
    with tcp_mesh(2, width=1024, deadline_s=0.3) as exchanges:
        exchanges[0].begin_step(0, 4096)
        with pytest.raises(PeerLost, match=r"ranks \[1\] take nothing"):
            exchanges[0].gather(hand_over(), torch.zeros(4096, 1024))


@pytest.mark.parametrize(
    ("step", "index", "tensors", "tokens", "sent"),
    [
        (4, 0, 1, 2, r"epoch 0, step 4, round 0, torch.float32 of shape \(1, 2, 8\)"),
        (3, 1, 1, 2, r"epoch 0, step 3, round 1, torch.float32 of shape \(1, 2, 8\)"),
        (3, 0, 1, 1, r"epoch 0, step 3, round 0, torch.float32 of shape \(1, 1, 8\)"),
        (3, 0, 1, 3, r"epoch 0, step 3, round 0, torch.float32 of shape \(1, 3, 8\)"),
        (3, 0, 2, 2, r"epoch 0, step 3, round 0, torch.float32 of shape \(2, 2, 8\)"),
        (300, 0, 1, 2, r"epoch 0, step 300, round 0, torch.float32 of shape \(1, 2, 8\)"),
    ],
    ids=["step", "round", "smaller", "larger", "more tensors", "longer head"],
)
def test_another_step_round_or_shape_is_refused_naming_both(
    step: int, index: int, tensors: int, tokens: int, sent: str
) -> None:
    def once(exchange: TcpExchange) -> None:
        if exchange.rank == 1:
            exchange.begin_step(step, tokens)
            exchange.gather(taken_from_1(index, tensors), torch.zeros(tensors, tokens, 8))
            return
        exchange.begin_step(3, 2)
        expected = r"epoch 0, step 3, round 0, torch.float32 of shape \(1, 2, 8\)"
        with pytest.raises(ProtocolError, match=f"rank 1 at .*sent {sent} where {expected}"):
            exchange.gather(taken_from_1(), None)

    with tcp_mesh(2, width=8) as exchanges:
        run(exchanges, once)


def test_another_epoch_width_and_dtype_are_refused() -> None:
    for options in ({"epoch": 2}, {"dtype": torch.float16}, {"width": 5}):
        with socket_pair() as (near, far):
            settings: dict[str, Any] = {
                "width": 4,
                "dtype": torch.bfloat16,
                "epoch": 1,
                "deadline_s": 5.0,
            }
            ours = TcpExchange(0, {1: near}, {1: "far:1"}, device="cpu", max_bytes=99, **settings)
            settings |= options
            theirs = TcpExchange(1, {0: far}, {0: "near:0"}, device="cpu", max_bytes=99, **settings)
            own = torch.zeros(1, settings["width"], dtype=settings["dtype"])
            for exchange in (ours, theirs):
                exchange.begin_step(0, 1)
            theirs.gather(taken_from_1(), own)
            with pytest.raises(ProtocolError, match="rank 1 at far:1 sent epoch"):
                ours.gather(taken_from_1(), None)
            ours.close()
            theirs.close()


def test_bytes_that_are_no_frame_are_refused() -> None:
    for garbage in (b"\xff" * 100, b"\x00" * 100, b"\x05", framing.encode_head({"a": 1}, 4)):
        with socket_pair() as (near, far):
            exchange = TcpExchange(0, {1: near}, {1: "far:1"}, 4, torch.float32, "cpu", 99)
            exchange.begin_step(0, 1)
            far.sendall(garbage)
            with pytest.raises(ProtocolError, match=r"bytes that are no frame .* where epoch 0"):
                exchange.gather(taken_from_1(), None)
            exchange.close()


def test_a_frame_that_comes_in_pieces_is_put_together_and_never_read_past() -> None:
    """Every byte comes alone, and the next frame right after the last one."""
    frames = b"".join(
        framing.encode_head([0, 0, index, 0, 1, 1, 4], 16) + bytes(framing.memory_of(torch.ones(4)))
        for index in range(2)
    )

    def trickle() -> None:
        for byte in frames:
            far.sendall(bytes([byte]))

    def receive() -> None:
        exchange.begin_step(0, 1)
        for index in range(2):
            gathered = exchange.gather(taken_from_1(index), None)
            assert gathered is not None
            assert torch.equal(gathered, torch.ones(1, 1, 4))

    with socket_pair() as (near, far):
        exchange = TcpExchange(
            0, {1: near}, {1: "far:1"}, 4, torch.float32, "cpu", 99, deadline_s=5
        )
        in_threads(trickle, receive)
        exchange.close()


@pytest.mark.parametrize("spin_s", [0.0, 5.0], ids=["sleeping", "spinning"])
def test_close_from_another_thread_unblocks_a_gather(spin_s: float) -> None:
    with tcp_mesh(2, spin_s=spin_s) as exchanges:
        exchanges[0].begin_step(0, 1)
        threading.Timer(0.1, exchanges[0].close).start()
        started = time.monotonic()
        with pytest.raises(ExchangeError, match="rank 0 has closed its exchange"):
            exchanges[0].gather(everyone(2), torch.zeros(1, WIDTH))
        assert time.monotonic() - started < 5
        exchanges[0].close()
        with pytest.raises(ExchangeError, match="rank 0 has closed its exchange"):
            exchanges[0].gather(everyone(2), torch.zeros(1, WIDTH))


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
        (torch.zeros(2, 4), r"shape \(2, 4\) .* to round 0, which takes .* shape \(1, 2, 3\)"),
    ],
    ids=["none", "dtype", "strides", "size"],
)
def test_what_cannot_be_sent_is_refused(own: torch.Tensor | None, reason: str) -> None:
    with tcp_mesh(2, width=3) as exchanges:
        exchanges[0].begin_step(0, 2)
        with pytest.raises(ExchangeError, match=reason):
            exchanges[0].gather(everyone(2), own)


def test_more_than_the_bound_is_neither_sent_nor_received() -> None:
    for exchange_round, own in ((hand_over(), torch.zeros(257, 1)), (taken_from_1(), None)):
        with tcp_mesh(2, width=1, max_bytes=1024) as exchanges:
            exchanges[0].begin_step(0, 257)
            with pytest.raises(ExchangeError, match=r"1028 bytes is over .* bound of 1024"):
                exchanges[0].gather(exchange_round, own)


def test_stats_count_each_round_once_over_all_ranks() -> None:
    rounds = [
        everyone(3, 0),
        Round(1, ((), (1, 2), (1, 2)), (0, 1, 1)),  # rank 0 has no part
        Round(2, ((), (0,), ()), (1, 0, 0)),  # a hand-over
    ]

    def walk(exchange: TcpExchange) -> None:
        for step in range(5):
            exchange.begin_step(step, 1)
            for each in rounds:
                contributes = any(exchange.rank in wanted for wanted in each.sources)
                exchange.gather(each, torch.zeros(1, 4) if contributes else None)

    with tcp_mesh(3, width=4) as exchanges:
        run(exchanges, walk)
        stats = [exchange.stats.snapshot() for exchange in exchanges]
    assert [s["rounds_led"] for s in stats] == [10, 5, 0]
    assert [s["rounds"] for s in stats] == [10, 15, 10]
    frame = len(framing.encode_head([0, 0, 0, 0, 1, 1, 4], 16)) + 16
    assert [s["bytes_sent"] for s in stats] == [15 * frame, 15 * frame, 15 * frame]
    assert [s["bytes_received"] for s in stats] == [10 * frame, 20 * frame, 15 * frame]
    # Waits are those of rounds that received from a peer.
    assert [s["round"] for s in stats] == [[0] * 5, [0, 1, 2] * 5, [0, 1] * 5]
    assert stats[0]["step"] == [0, 1, 2, 3, 4]
    for snapshot in stats:
        waits = snapshot["wait_s"]
        assert isinstance(waits, list)
        assert all(0 < wait_s < 10 for wait_s in waits)
