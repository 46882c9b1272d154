from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from helpers.exchange_mesh import SECRET, descriptors_at_first, in_threads, open_descriptors

from cqil_dist.errors import ExchangeError, PeerLost, ProtocolError
from cqil_dist.exchange import COORDINATOR, Listener, connect, connect_mesh
from cqil_dist.exchange import listener as listener_module
from cqil_dist.exchange.handshake import ANSWER_BYTES, Acceptor, introduce

OTHER_SECRET = bytes(32)


def dial(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_both_ends_learn_who_the_other_is_and_can_talk() -> None:
    with Listener("127.0.0.1", SECRET, epoch=3) as listener, ExitStack() as stack:
        accepted, near, coordinator = in_threads(
            lambda: listener.accept_peers({1, COORDINATOR}, 10.0),
            lambda: {0: connect(listener.address, 1, 0, SECRET, 3, 10.0)},
            lambda: {0: connect(listener.address, COORDINATOR, 0, SECRET, 3, 10.0)},
        )
        for sock in (*accepted.values(), near[0], coordinator[0]):
            stack.enter_context(sock)
        assert accepted.keys() == {1, COORDINATOR}
        for peer, far in ((1, near[0]), (COORDINATOR, coordinator[0])):
            assert accepted[peer].getpeername() == far.getsockname()
            far.setblocking(True)
            accepted[peer].send(b"hello")
            assert far.recv(99) == b"hello"


@pytest.mark.parametrize(
    ("secret", "epoch"), [(OTHER_SECRET, 3), (SECRET, 4)], ids=["secret", "epoch"]
)
def test_a_connector_of_another_launch_or_epoch_is_refused(secret: bytes, epoch: int) -> None:
    def accept() -> None:
        with pytest.raises(PeerLost, match=r"rank 1 .*ranks \[1\] did not connect"):
            listener.accept_peers({1}, 0.5)

    def join() -> None:
        with pytest.raises(ProtocolError, match=listener.address):
            connect(listener.address, 1, 0, secret, epoch, 10.0)

    with Listener("127.0.0.1", SECRET, epoch=3) as listener:
        in_threads(accept, join)


def test_the_acceptor_names_the_address_of_a_wrong_secret() -> None:
    acceptor = Acceptor(SECRET, 0, "10.1.2.3:4")
    with pytest.raises(ProtocolError, match=r"10\.1\.2\.3:4 does not hold this launch's secret"):
        acceptor.verify(bytes(ANSWER_BYTES))


@pytest.mark.parametrize(
    ("greet", "reason"),
    [
        (lambda: Acceptor(OTHER_SECRET, 0, "").greeting, "does not hold this launch's secret"),
        (lambda: b"HTTP/1.1 400 Bad Request".ljust(44), "greets with b'HTTP/1.1'"),
        (lambda: b"cqildist", "closed the connection"),
    ],
    ids=["no secret", "another protocol", "half a greeting"],
)
def test_a_connector_refuses_an_acceptor_that_is_not_ours(
    greet: Callable[[], bytes], reason: str
) -> None:
    """An impostor sends a greeting, and then a proof made without the secret."""

    def pretend() -> None:
        sock, _ = server.accept()
        with sock:
            greeting = greet()
            sock.sendall(greeting)
            if len(greeting) == 44:
                sock.recv(ANSWER_BYTES)
                sock.sendall(bytes(32))

    def join() -> None:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ProtocolError, match=reason):
            connect(address, 1, 0, SECRET, 0, 5.0)

    with socket.create_server(("127.0.0.1", 0)) as server:
        in_threads(pretend, join)


def test_a_proof_cannot_be_played_back_to_its_maker() -> None:
    """A stranger without the secret returns a rank's own answer to it as the acceptor's proof."""

    def reflect() -> None:
        sock, _ = server.accept()
        with sock:
            sock.sendall(Acceptor(OTHER_SECRET, 0, "").greeting)
            sock.sendall(sock.recv(ANSWER_BYTES)[-32:])

    def join() -> None:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ProtocolError, match="does not hold"):
            connect(address, 1, 0, SECRET, 0, 5.0)

    with socket.create_server(("127.0.0.1", 0)) as server:
        in_threads(reflect, join)


def test_a_recorded_answer_is_of_no_use_in_another_conversation() -> None:
    near, far = socket.socketpair()
    first = Acceptor(SECRET, 0, "first")
    with near, far:
        far.sendall(first.greeting + bytes(32))  # a wrong proof: only the answer is of interest
        with pytest.raises(ProtocolError):
            introduce(near, SECRET, 1, 0, "first", 5.0)
        answer = far.recv(ANSWER_BYTES)
    assert first.verify(answer)[0] == 1
    with pytest.raises(ProtocolError, match="second"):
        Acceptor(SECRET, 0, "second").verify(answer)


def test_a_silent_acceptor_is_given_up_at_the_deadline_and_nothing_leaks() -> None:
    before = descriptors_at_first()
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        with pytest.raises(ProtocolError, match="0 of the handshake's next 44 bytes"):
            connect(f"127.0.0.1:{server.getsockname()[1]}", 1, 0, SECRET, 0, 0.2)
        assert 0.2 <= time.monotonic() - started < 2
    assert open_descriptors() == before


def test_nobody_listening_is_a_lost_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(PeerLost, match=f"lost rank 7 at {address}: cannot connect"):
        connect(address, 1, 7, SECRET, 0, 5.0)


def test_strangers_do_not_keep_a_rank_from_joining() -> None:
    before = descriptors_at_first()
    with Listener("127.0.0.1", SECRET, epoch=0) as listener, ExitStack() as stack:
        strangers = [stack.enter_context(dial(listener.address)) for _ in range(5)]
        silent, half, garbage, huge, closed = strangers
        half.sendall(struct.pack("<i", 1))
        garbage.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        huge.sendall(b"\xff" * 100_000)
        closed.close()
        started = time.monotonic()
        accepted, near = in_threads(
            lambda: listener.accept_peers({1}, 10.0),
            lambda: {0: connect(listener.address, 1, 0, SECRET, 0, 10.0)},
        )
        assert time.monotonic() - started < 4  # a stranger's handshake may take 5 s
        assert accepted[1].getpeername() == near[0].getsockname()
        stack.enter_context(accepted[1])
        stack.enter_context(near[0])
        # The strangers were dropped: at most their greeting comes, then the end.
        for stranger in (silent, half):
            data = bytearray()
            while chunk := stranger.recv(1000):
                data += chunk
            assert len(data) == 44
    assert open_descriptors() == before


def test_a_silent_stranger_is_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_HANDSHAKE_S", 0.1)

    def accept() -> None:
        with pytest.raises(PeerLost):
            listener.accept_peers({1}, 3.0)

    def stay_silent() -> float:
        with dial(listener.address) as sock:
            started = time.monotonic()
            assert len(sock.recv(100)) == 44
            assert sock.recv(100) == b""
            return time.monotonic() - started

    with Listener("127.0.0.1", SECRET, epoch=0) as listener:
        _, dropped_after_s = in_threads(accept, stay_silent)
    assert dropped_after_s is not None
    assert dropped_after_s < 2.5


def test_a_flood_of_silent_strangers_makes_way_for_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_MAX_PENDING", 4)
    with Listener("127.0.0.1", SECRET, epoch=0) as listener, ExitStack() as stack:
        strangers = [stack.enter_context(dial(listener.address)) for _ in range(20)]
        accepted, near = in_threads(
            lambda: listener.accept_peers({1}, 5.0),
            lambda: {0: connect(listener.address, 1, 0, SECRET, 0, 5.0)},
        )
        assert accepted.keys() == {1}
        for sock in (accepted[1], near[0], *strangers):
            sock.close()


def test_a_second_connection_of_a_rank_and_an_unexpected_rank_are_dropped() -> None:
    with Listener("127.0.0.1", SECRET, epoch=0) as listener, ExitStack() as stack:

        def join(rank: int) -> socket.socket:
            return stack.enter_context(connect(listener.address, rank, 0, SECRET, 0, 10.0))

        def join_in_order() -> dict[int, socket.socket]:
            first, twin, unexpected = join(1), join(1), join(5)
            for refused in (twin, unexpected):
                refused.settimeout(5)
                assert refused.recv(1) == b""
            return {1: first, 2: join(2)}

        accepted, joined = in_threads(lambda: listener.accept_peers({1, 2}, 10.0), join_in_order)
        for rank, sock in accepted.items():
            stack.enter_context(sock)
            assert sock.getpeername() == joined[rank].getsockname()


def test_a_mesh_that_does_not_complete_leaves_nothing_open() -> None:
    before = descriptors_at_first()
    with (
        Listener("127.0.0.1", SECRET, epoch=0) as low,
        Listener("127.0.0.1", SECRET, epoch=0) as middle,
    ):
        addresses = {0: low.address, 1: middle.address, 2: "127.0.0.1:1"}

        def join(listener: Listener, rank: int) -> None:
            with pytest.raises(PeerLost, match=r"lost rank 2 .*ranks \[2\] did not connect"):
                connect_mesh(listener, rank, addresses, SECRET, 0, 2.0)

        in_threads(lambda: join(low, 0), lambda: join(middle, 1))
    assert open_descriptors() == before


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "0"])
def test_listening_on_every_interface_is_refused(host: str) -> None:
    with pytest.raises(ExchangeError, match="every interface"):
        Listener(host, SECRET, epoch=0)


def test_an_address_of_another_node_is_refused() -> None:
    with pytest.raises(OSError, match=r"cannot listen on '192\.0\.2\.1'"):
        Listener("192.0.2.1", SECRET, epoch=0)


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ProtocolError, match="32 bytes, not 5"):
        Acceptor(b"short", 0, "")
