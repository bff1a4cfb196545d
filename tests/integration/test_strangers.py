"""What somebody without a certificate can do to a broker that is within reach."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator

import pytest

from support.running_broker import RunningBroker, start_broker
from support.vault import prepare

FEW_DESCRIPTORS = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))
runpy.run_module("carnet_broker", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(name="broker", scope="module")
def _broker(openbao, tmp_path_factory) -> Iterator[RunningBroker]:
    directory = tmp_path_factory.mktemp("broker")
    place = prepare(openbao, directory / "login")
    with start_broker(place, directory / "broker") as broker:
        yield broker
    place.close()


def silent_connections(address: str, number: int) -> Iterator[socket.socket]:
    """Connect, and say nothing."""
    host, _, port = address.rpartition(":")
    for _ in range(number):
        yield socket.create_connection((host, int(port)), timeout=5)


def is_closed(connection: socket.socket) -> bool:
    """Say whether the other side has hung up."""
    connection.setblocking(False)  # noqa: FBT003 - as socket has it
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_silent_connections_take_no_probe_its_answer_and_are_closed(broker):
    """Three hundred of them on the plain port: health is answered at once, and within seconds they are gone."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(one) for one in silent_connections(broker.addresses["plain"], 300)]
        assert [200, 200, 200] == [broker.get(path)[0] for path in ("/livez", "/readyz", "/oauth2/jwks")]
        broker.wait_for(lambda: all(map(is_closed, silent)), "the broker hangs up")


def test_a_request_that_drips_is_ended(broker):
    """A head that never ends holds its connection for some seconds only."""
    host, _, port = broker.addresses["plain"].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for sign in b"GET /livez HTTP/1.1\r\nX-Slow: " + b"x" * 1000:
                connection.sendall(bytes([sign]))
                time.sleep(0.1)
                if is_closed(connection):
                    break
                connection.setblocking(True)  # noqa: FBT003 - as socket has it
        assert 4 < time.monotonic() - started < 8


def test_a_broker_raises_its_limit_of_descriptors_and_keeps_some_for_itself(broker):
    """The soft limit is the hard one; and with few of them, fewer connections are let in than are configured."""
    soft, hard = resource.prlimit(broker.process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard
    limited = [entry for entry in broker.log() if entry["event"] == "connections_limited"]
    assert bool(limited) == ((soft - 672) // 2 - 129 < 10_000)


def test_with_few_descriptors_strangers_do_not_take_the_last(openbao, tmp_path):
    """1,000 in all: as many silent strangers as can be at the token port, and the broker still writes and answers."""
    place = prepare(openbao, tmp_path / "login")
    with start_broker(place, tmp_path / "broker", command=("-c", FEW_DESCRIPTORS)) as broker:
        (limited,) = (entry for entry in broker.log() if entry["event"] == "connections_limited")
        assert (145, 1000) == (limited["possible"], limited["descriptors"])
        with contextlib.ExitStack() as stack:
            for one in silent_connections(broker.addresses["tokens"], 400):
                stack.enter_context(one)
            assert 200 == broker.get("/readyz")[0]
            assert broker.key_set().generation
    place.close()
