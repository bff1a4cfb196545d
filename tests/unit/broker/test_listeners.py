"""When the TLS configuration is replaced: as often as gRPC survives it, and never in the middle of a burst."""

from __future__ import annotations

import pytest

from carnet.testing import CertificateAuthority
from carnet_broker.edges.grpc.listeners import TlsPems, _Configurations


class Clock:
    """A clock that moves when it is told to, and when somebody sleeps."""

    def __init__(self) -> None:
        """Begin somewhere."""
        self.at = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.at

    def sleep(self, seconds: float) -> None:
        """Let the time pass."""
        self.at += seconds


@pytest.fixture(scope="module")
def pems() -> list[TlsPems]:
    """Two states of the files."""
    made = []
    for _ in range(2):
        ca = CertificateAuthority.create()
        mine = ca.issue("spiffe://prod.example/ns/carnet/sa/broker")
        made.append(TlsPems(mine.private_key_pem, mine.certificate_pem, ca.root_pem))
    return made


def test_t18_a_quiet_listener_takes_a_new_configuration_at_each_handshake(pems: list[TlsPems]) -> None:
    """So no session of before finds its cache: half a second after the last handshake, and not sooner."""
    clock = Clock()
    configurations = _Configurations(lambda: pems[0], mono=clock, sleep=clock.sleep)
    for pause, is_new in ((0.49, False), (0.49, False), (0.5, True), (3.0, True), (0.1, False), (0.6, True)):
        clock.at += pause
        assert is_new == (configurations() is not None), pause


def test_a_burst_never_sees_a_replacement_and_never_waits(pems: list[TlsPems]) -> None:
    """A configuration that is replaced between another handshake's asking and using ends the process."""
    clock = Clock()
    configurations = _Configurations(lambda: pems[0], mono=clock, sleep=clock.sleep)
    clock.at += 1
    assert configurations() is not None
    before = clock.at
    assert [None] * 1000 == [configurations() for _ in range(1000)]
    assert before == clock.at


def test_changed_files_hold_a_burst_back_for_half_a_second_once(pems: list[TlsPems]) -> None:
    """The new certificate is served to the very next handshake, and the burst goes on after it."""
    clock = Clock()
    served = [pems[0]]
    configurations = _Configurations(lambda: served[0], mono=clock, sleep=clock.sleep)
    assert configurations() is None
    served[0] = pems[1]
    before = clock.at
    assert configurations() is not None
    assert clock.at - before == pytest.approx(0.5, abs=0.03)
    before = clock.at
    assert [None] * 10 == [configurations() for _ in range(10)]
    assert before == clock.at


def test_t18_a_burst_without_end_is_held_back_every_ten_minutes(pems: list[TlsPems]) -> None:
    """That bounds for how long a session can be resumed under load."""
    clock = Clock()
    configurations = _Configurations(lambda: pems[0], mono=clock, sleep=clock.sleep)
    replaced = []
    while clock.at < 1000 + 1900:
        clock.at += 0.2
        if configurations() is not None:
            replaced.append(round(clock.at - 1000))
    assert [601, 1201, 1802] == pytest.approx(replaced, abs=2)
