from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from helpers.exchange_mesh import in_threads, socket_pair

from cqil_dist.errors import ExchangeError, PeerLost, ProtocolError
from cqil_dist.exchange import Link, framing, recv_each

MAX_BYTES = 1 << 25
SEND_S = 30.0

Pair = tuple[Link, Link]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with socket_pair() as (near, far):
        links = (
            Link(near, 1, "near:1", MAX_BYTES, SEND_S),
            Link(far, -1, "far:2", MAX_BYTES, SEND_S),
        )
        yield links
        for link in links:
            link.close()


@pytest.mark.parametrize(
    "payload",
    [
        None,
        torch.randn(1, 576),
        torch.randn(3, 5).to(torch.bfloat16),
        torch.randn(2, 2).to(torch.float16),
        torch.arange(7),
        torch.tensor(3.5),
        torch.empty(0, 576),
        torch.randn(4, 300_000),  # longer than any socket buffer read at once
    ],
    ids=lambda value: "none" if value is None else f"{value.dtype}{list(value.shape)}",
)
def test_messages_arrive_whole_and_in_order(pair: Pair, payload: torch.Tensor | None) -> None:
    near, far = pair
    headers = [{"step": n, "slots": [1, 2], "name": "é", "last": None} for n in range(3)]

    def send() -> None:
        for header in headers:
            near.send(header, payload)
        near.send({"end": True})

    def receive() -> None:
        for header in headers:
            received_header, received = far.recv(10.0)
            assert received_header == header
            if payload is None:
                assert received is None
            else:
                assert received is not None
                assert received.dtype is payload.dtype
                assert torch.equal(received, payload)
        assert far.recv(10.0) == ({"end": True}, None)

    in_threads(send, receive)


def test_a_message_that_comes_byte_by_byte_is_put_together(pair: Pair) -> None:
    near, far = pair
    payload = torch.arange(6, dtype=torch.float32)
    entry = {"payload": framing.describe_tensor(payload)}
    message = framing.encode_head({"a": 1, **entry}, 24) + bytes(framing.memory_of(payload))

    def trickle() -> None:
        for byte in message + message:
            while True:
                try:
                    near._sock.send(bytes([byte]))
                    break
                except BlockingIOError:
                    time.sleep(0.001)

    def receive() -> None:
        for _ in range(2):
            header, received = far.recv(10.0)
            assert header == {"a": 1}
            assert received is not None
            assert torch.equal(received, payload)

    in_threads(trickle, receive)


def test_a_timeout_names_the_peer_and_leaves_the_link_usable(pair: Pair) -> None:
    near, far = pair
    head = framing.encode_head({"a": 1})
    near._sock.send(head[:5])
    started = time.monotonic()
    with pytest.raises(PeerLost, match=r"lost the coordinator at far:2: no message within 0\.1 s"):
        far.recv(0.1)
    assert 0.1 <= time.monotonic() - started < 5
    near._sock.send(head[5:])
    assert far.recv(5.0) == ({"a": 1}, None)


def test_a_closed_peer_is_lost_at_once(pair: Pair) -> None:
    near, far = pair
    near.send({"last": 1})
    near.close()
    assert far.recv(None) == ({"last": 1}, None)  # what came before the end still counts
    started = time.monotonic()
    with pytest.raises(PeerLost, match="it closed the connection") as caught:
        far.recv(None)
    assert (caught.value.peer, caught.value.address) == (-1, "far:2")
    with pytest.raises(PeerLost):
        far.send({}, torch.zeros(MAX_BYTES // 4))
    assert time.monotonic() - started < 5


def test_close_wakes_a_receive_that_waits_for_ever(pair: Pair) -> None:
    _, far = pair
    closer = threading.Timer(0.1, far.close)
    closer.start()
    started = time.monotonic()
    with pytest.raises(PeerLost, match="this end closed the connection"):
        far.recv(None)
    assert time.monotonic() - started < 5
    closer.join()
    far.close()
    for use in (lambda: far.recv(None), lambda: far.send({})):
        with pytest.raises(PeerLost, match="this end closed"):
            use()


def test_close_wakes_a_blocked_send() -> None:
    with socket_pair() as (near, _):
        link = Link(near, 1, "near:1", MAX_BYTES, SEND_S)
        closer = threading.Timer(0.1, link.close)
        closer.start()
        started = time.monotonic()
        with pytest.raises(PeerLost):
            link.send({}, torch.zeros(MAX_BYTES // 4))
        assert time.monotonic() - started < 5
        closer.join()


def test_a_peer_that_reads_nothing_is_lost_at_the_send_deadline() -> None:
    with socket_pair() as (near, _):
        link = Link(near, 1, "near:1", MAX_BYTES, send_deadline_s=0.2)
        with pytest.raises(PeerLost, match=r"rank 1 at near:1: it made no room .* 0\.2 s"):
            link.send({}, torch.zeros(MAX_BYTES // 4))
        with pytest.raises(PeerLost):  # half a message is out: nothing may follow it
            link.send({})
        link.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "claims a header"),
        (framing.encode_head([1, 2]), "header is a dict"),
        (framing.encode_head({}, 8) + bytes(8), "without 'payload' entry"),
        (framing.encode_head({"payload": [0, 3]}, 8) + bytes(8), "12 bytes, but carries 8"),
        (framing.PREFIX.pack(1, MAX_BYTES + 1), "bound is"),
        (framing.PREFIX.pack(2, 0) + b"\xc1\xc1", "not valid msgpack"),
    ],
)
def test_what_is_no_message_is_refused_naming_the_peer(
    pair: Pair, data: bytes, reason: str
) -> None:
    near, far = pair
    near._sock.send(data)
    with pytest.raises(ProtocolError, match=f"the coordinator at far:2: .*{reason}"):
        far.recv(5.0)


def test_a_sender_is_held_to_the_bounds_and_the_reserved_key(pair: Pair) -> None:
    near, far = pair
    with pytest.raises(ExchangeError, match="bound"):
        near.send({}, torch.empty(MAX_BYTES + 1, dtype=torch.float16))
    with pytest.raises(ExchangeError, match="'payload' is taken"):
        near.send({"payload": 1})
    near.send({"still": "good"})
    assert far.recv(5.0) == ({"still": "good"}, None)


class Star:
    """A coordinator's links to some ranks, and the ranks' ends of them."""

    def __init__(self, ranks: int) -> None:
        sockets: list[tuple[socket.socket, socket.socket]] = []
        for _ in range(ranks):
            with socket.create_server(("127.0.0.1", 0)) as server:
                near = socket.create_connection(server.getsockname())
                sockets.append((near, server.accept()[0]))
        self.coordinator = [
            Link(near, rank, f"rank:{rank}", MAX_BYTES, SEND_S)
            for rank, (near, _) in enumerate(sockets)
        ]
        self.ranks = [Link(far, -1, "coordinator:0", MAX_BYTES, SEND_S) for _, far in sockets]

    def close(self) -> None:
        for link in (*self.coordinator, *self.ranks):
            link.close()


@pytest.fixture
def star() -> Iterator[Star]:
    star = Star(3)
    yield star
    star.close()


def test_recv_each_returns_in_the_order_of_links_however_they_come(star: Star) -> None:
    logits = torch.randn(500_000)  # large, so that the three come interleaved

    def answer(rank: int) -> None:
        time.sleep(0.05 * (3 - rank))
        star.ranks[rank].send({"rank": rank}, logits + rank)

    def collect() -> None:
        for rank, (header, payload) in enumerate(recv_each(star.coordinator, 10.0)):
            assert header == {"rank": rank}
            assert payload is not None
            assert torch.equal(payload, logits + rank)

    in_threads(collect, *(lambda rank=rank: answer(rank) for rank in range(3)))


def test_recv_each_fails_at_once_when_any_link_closes(star: Star) -> None:
    star.ranks[0].send({})
    threading.Timer(0.1, star.ranks[2].close).start()
    started = time.monotonic()
    with pytest.raises(PeerLost, match="lost rank 2 at rank:2: it closed"):
        recv_each(star.coordinator, None)
    assert time.monotonic() - started < 5


def test_recv_each_names_all_that_owe_a_message_at_the_timeout(star: Star) -> None:
    star.ranks[1].send({})
    with pytest.raises(PeerLost, match=r"lost rank 0 .*ranks owing: \[0, 2\]"):
        recv_each(star.coordinator, 0.1)


def test_recv_each_leaves_a_second_message_for_the_next_time(star: Star) -> None:
    def answer(rank: int) -> None:
        time.sleep(0.05 * rank)
        for turn in range(2):
            star.ranks[rank].send({"turn": turn})

    def collect() -> None:
        for turn in range(2):
            assert recv_each(star.coordinator, 10.0) == [({"turn": turn}, None)] * 3

    in_threads(collect, *(lambda rank=rank: answer(rank) for rank in range(3)))
