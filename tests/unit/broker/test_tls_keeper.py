"""The connection of a listener to itself: what it takes for an answer, and that it never waits."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Iterator

import pytest

from carnet_broker.edges.grpc.keeper import Keeper, KeeperState, keepers_of

SERVER_HELLO = bytes.fromhex("160303007a02")
ALERT = bytes.fromhex("150303000202") + b"\x28"


@pytest.fixture(name="listener")
def _listener() -> Iterator[socket.socket]:
    """A listener that answers what the test says."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        yield listener


def kept(listener: socket.socket) -> tuple[Keeper, socket.socket]:
    """Begin a keeper of `listener`, and return it with the listener's end of it."""
    begin = keepers_of("0.0.0.0", listener.getsockname()[1])  # noqa: S104 - as a broker is bound
    assert begin is not None
    keeper = begin()
    assert keeper is not None
    return keeper, listener.accept()[0]


def soon(keeper: Keeper, state: KeeperState) -> bool:
    """Say whether `keeper` comes to `state`."""
    until = time.monotonic() + 5
    while keeper.state() is not state and time.monotonic() < until:
        time.sleep(0.005)
    return keeper.state() is state


def test_a_keeper_sends_the_first_message_of_a_tls_client_and_waits(listener: socket.socket) -> None:
    """A handshake record with a ClientHello in it (RFC 8446 section 4.1.2), and not a byte more, ever."""
    keeper, other = kept(listener)
    with other:
        hello = other.recv(65_536)
        assert (22, 1) == (hello[0], hello[5])
        assert int.from_bytes(hello[3:5]) == len(hello) - 5
        assert KeeperState.WAITING is keeper.state()
        other.sendall(SERVER_HELLO + b"x" * 2000)
        assert soon(keeper, KeeperState.HOLDING)
        other.settimeout(0.1)
        with pytest.raises(TimeoutError):
            other.recv(1)
    keeper.close()


def test_half_an_answer_is_none(listener: socket.socket) -> None:
    """It holds with the last byte that says what the message is."""
    keeper, other = kept(listener)
    with other:
        other.sendall(SERVER_HELLO[:5])
        time.sleep(0.05)
        assert KeeperState.WAITING is keeper.state()
        other.sendall(SERVER_HELLO[5:])
        assert soon(keeper, KeeperState.HOLDING)
    keeper.close()


@pytest.mark.parametrize("answer", [ALERT, b"HTTP/1.1 400", bytes.fromhex("160303007a0b"), b""])
def test_another_answer_is_no_handshake(listener: socket.socket, answer: bytes) -> None:
    """An alert, another protocol, another message, or none: the keeper is gone."""
    keeper, other = kept(listener)
    with other:
        other.sendall(answer)
        other.shutdown(socket.SHUT_WR)
        assert soon(keeper, KeeperState.GONE)


def test_a_keeper_that_the_listener_ends_holds_nothing_any_more(listener: socket.socket) -> None:
    """Whether it is ended in order or cut."""
    keeper, other = kept(listener)
    with other:
        other.sendall(SERVER_HELLO)
        assert soon(keeper, KeeperState.HOLDING)
    assert soon(keeper, KeeperState.GONE)


def test_a_keeper_that_is_closed_or_forgotten_ends_at_the_listener(listener: socket.socket) -> None:
    """The listener sees the end of it, and a closed one is gone."""
    keeper, other = kept(listener)
    keeper.close()
    assert KeeperState.GONE is keeper.state()
    with other:
        other.settimeout(5)
        other.recv(65_536)
        assert other.recv(1) == b""
    keeper, other = kept(listener)
    del keeper
    gc.collect()
    with other:
        other.settimeout(5)
        other.recv(65_536)
        assert other.recv(1) == b""


def test_where_nobody_listens_there_is_no_keeper() -> None:
    """Neither is there one of a name that does not resolve. Nothing is raised, and nothing takes long."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    begin = keepers_of("127.0.0.1", port)
    assert begin is not None
    keeper = begin()
    assert keeper is None or soon(keeper, KeeperState.GONE)
    assert keepers_of("no.such.name.invalid", port) is None


def test_a_listener_that_is_full_is_not_waited_for() -> None:
    """It has as many connections as may wait for it; the keeper is none, or has no answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        begin = keepers_of("127.0.0.1", listener.getsockname()[1])
        assert begin is not None
        before = time.monotonic()
        keepers = [begin() for _ in range(5)]
        assert {None if keeper is None else keeper.state() for keeper in keepers} <= {None, KeeperState.WAITING}
        assert time.monotonic() - before < 1


@pytest.mark.parametrize("bound", ["[::]", "[::1]", "127.0.0.1", "localhost"])
def test_an_address_is_understood_as_the_configuration_has_it(bound: str) -> None:
    """IPv6 in brackets, and all addresses of the host."""
    assert keepers_of(bound, 8443) is not None
