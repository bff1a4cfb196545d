"""When the TLS configuration is replaced: as often as gRPC survives it, and never while somebody may be between."""

from __future__ import annotations

import pytest

from carnet.testing import CertificateAuthority
from carnet_broker.edges.grpc.configurations import Configurations, Keeping, TlsPems
from carnet_broker.edges.grpc.keeper import KeeperState

WAITING, HOLDING, GONE = KeeperState


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


class FakeKeeper:
    """A keeper that is as far as the test says."""

    def __init__(self, state: KeeperState = HOLDING) -> None:
        """Begin."""
        self.is_at = state

    def state(self) -> KeeperState:
        """Return how far it is."""
        return self.is_at

    def close(self) -> None:
        """Give it up."""
        self.is_at = GONE


class Listener:
    """The configurations of one listener, and all keepers that were begun for it."""

    def __init__(
        self, pems: TlsPems, *, keepers: KeeperState | None = None, timeout: float = 5.0, at_most: int = 8
    ) -> None:
        """Begin; `keepers` is what becomes of a keeper at once, and without it there are none."""
        self.clock = Clock()
        self.pems = pems
        self.keepers: list[FakeKeeper] = []
        self.becomes = keepers
        keeping = Keeping(handshake_timeout=timeout, at_most=at_most)
        self.configurations = Configurations(lambda: self.pems, keeping, mono=self.clock, sleep=self.clock.sleep)
        if keepers is not None:
            self.configurations.keep_by(self.begin)

    def begin(self) -> FakeKeeper | None:
        """Return a keeper, or none where the test has it so."""
        if self.becomes is None:
            return None
        self.keepers.append(FakeKeeper(self.becomes))
        return self.keepers[-1]

    def replaces(self, *, after: float = 0.0) -> bool:
        """Say whether the next handshake, after so many seconds, gets a new configuration."""
        self.clock.at += after
        return self.configurations() is not None


@pytest.fixture(scope="module")
def pems() -> list[TlsPems]:
    """Two states of the files."""
    made = []
    for _ in range(2):
        ca = CertificateAuthority.create()
        mine = ca.issue("spiffe://prod.example/ns/carnet/sa/broker")
        made.append(TlsPems(mine.private_key_pem, mine.certificate_pem, ca.root_pem))
    return made


# -- without keepers: time alone ---------------------------------------------------------------------------------------


def test_t18_a_quiet_listener_takes_a_new_configuration_at_each_handshake(pems: list[TlsPems]) -> None:
    """So no session of before is of use: half a second after the last handshake, and not sooner."""
    listener = Listener(pems[0])
    for pause, is_new in ((0.49, False), (0.49, False), (0.5, True), (3.0, True), (0.1, False), (0.6, True)):
        assert is_new == listener.replaces(after=pause), pause


def test_a_burst_never_sees_a_replacement_and_never_waits(pems: list[TlsPems]) -> None:
    """A configuration that is replaced between another handshake's asking and using ends the process."""
    listener = Listener(pems[0])
    assert listener.replaces(after=1)
    before = listener.clock.at
    assert not any(listener.replaces() for _ in range(1000))
    assert before == listener.clock.at


def test_changed_files_hold_a_burst_back_for_half_a_second_once(pems: list[TlsPems]) -> None:
    """The new certificate is served to the very next handshake, and the burst goes on after it."""
    listener = Listener(pems[0])
    assert not listener.replaces()
    listener.pems = pems[1]
    before = listener.clock.at
    assert listener.replaces()
    assert listener.clock.at - before == pytest.approx(0.5, abs=0.03)
    before = listener.clock.at
    assert not any(listener.replaces() for _ in range(10))
    assert before == listener.clock.at


def test_t18_a_burst_without_end_is_held_back_each_minute(pems: list[TlsPems]) -> None:
    """That bounds for how long a session can be resumed where no keeper comes to hold."""
    listener = Listener(pems[0])
    replaced = []
    while listener.clock.at < 1000 + 190:
        if listener.replaces(after=0.2):
            replaced.append(round(listener.clock.at - 1000))
    assert [61, 121, 182] == pytest.approx(replaced, abs=2)


# -- with keepers ------------------------------------------------------------------------------------------------------


def test_t18_a_burst_gets_a_new_configuration_at_each_handshake_while_keepers_hold(pems: list[TlsPems]) -> None:
    """The first handshake finds no keeper, and begins one; from then on nobody waits and nothing is resumed."""
    listener = Listener(pems[0], keepers=HOLDING)
    assert not listener.replaces()
    before = listener.clock.at
    assert [True] * 8 == [listener.replaces() for _ in range(8)]
    assert before == listener.clock.at


@pytest.mark.parametrize("state", [WAITING, GONE])
def test_a_keeper_that_does_not_hold_replaces_nothing_in_a_burst(pems: list[TlsPems], state: KeeperState) -> None:
    """The twin: as soon as it holds, the next handshake gets a new configuration."""
    listener = Listener(pems[0], keepers=state)
    assert not any(listener.replaces() for _ in range(10))
    listener.keepers[-1].is_at = HOLDING
    assert listener.replaces()


def test_the_handshake_of_a_keeper_itself_replaces_nothing_however_late_it_is(pems: list[TlsPems]) -> None:
    """Or it would begin another one, and that another one; after a second it is not waited for."""
    for late, is_new in ((0.6, False), (1.1, True)):
        listener = Listener(pems[0], keepers=WAITING)
        assert listener.replaces(after=2)
        assert is_new == listener.replaces(after=late)


def test_a_replaced_configuration_is_held_for_half_a_second_more(pems: list[TlsPems]) -> None:
    """For those who asked before and are using it now."""
    listener = Listener(pems[0], keepers=HOLDING)
    assert not listener.replaces()
    assert listener.replaces()
    for pause, state in ((0.2, HOLDING), (0.29, HOLDING), (0.02, GONE)):
        listener.replaces(after=pause)
        assert state is listener.keepers[0].is_at, pause


def test_no_more_keepers_than_allowed_and_replacements_go_on_as_they_end(pems: list[TlsPems]) -> None:
    """That bounds what a flood of strangers costs."""
    listener = Listener(pems[0], keepers=HOLDING, at_most=3)
    assert [False, True, True, True, False, False] == [listener.replaces() for _ in range(6)]
    assert 4 == len(listener.keepers)
    assert [False, False, True] == [listener.replaces(after=pause) for pause in (0.3, 0.19, 0.02)]


def test_a_keeper_is_relied_upon_only_well_before_the_listener_ends_it(pems: list[TlsPems]) -> None:
    """With five seconds for a handshake: for four. Another one is begun then, and the old one is given up."""
    for age, is_new in ((4.0, True), (4.01, False)):
        listener = Listener(pems[0], keepers=WAITING)
        assert listener.replaces(after=1)
        until = listener.clock.at + age
        while listener.clock.at < until - 0.3:
            assert not listener.replaces(after=0.3)
        listener.keepers[-1].is_at = HOLDING
        assert is_new == listener.replaces(after=until - listener.clock.at)
        assert 2 == len(listener.keepers)
        assert (HOLDING if is_new else GONE) is listener.keepers[0].is_at


def test_a_timeout_too_short_for_keepers_leaves_it_to_time(pems: list[TlsPems]) -> None:
    """A keeper that may end at any moment holds nothing."""
    listener = Listener(pems[0], keepers=HOLDING, timeout=0.6)
    assert not any(listener.replaces() for _ in range(10))
    assert listener.replaces(after=0.5)


def test_where_no_keeper_can_be_had_one_is_tried_each_second(pems: list[TlsPems]) -> None:
    """Not at each handshake: there may be no descriptor left."""
    listener = Listener(pems[0], keepers=GONE)
    while listener.clock.at < 1000 + 5:
        assert not listener.replaces(after=0.1)
    assert len(listener.keepers) == pytest.approx(5, abs=1)
    listener.becomes = None
    assert not any(listener.replaces(after=0.4) for _ in range(5))
    listener.becomes = HOLDING
    assert True in [listener.replaces(after=0.4) for _ in range(4)]


def test_changed_files_wait_for_a_keeper_or_half_a_second_whichever_is_first(pems: list[TlsPems]) -> None:
    """A held configuration is replaced at once."""
    for becomes, longest in ((HOLDING, 0.0), (WAITING, 0.5), (GONE, 0.5)):
        listener = Listener(pems[0], keepers=becomes)
        assert not listener.replaces()
        listener.pems = pems[1]
        before = listener.clock.at
        assert listener.replaces()
        assert listener.clock.at - before == pytest.approx(longest, abs=0.03)


def test_a_listener_that_stops_replaces_nothing_any_more(pems: list[TlsPems]) -> None:
    """It ends its keepers too, at a moment that we do not know."""
    listener = Listener(pems[0], keepers=HOLDING)
    assert [False, True] == [listener.replaces() for _ in range(2)]
    listener.configurations.freeze()
    assert [False, False] == [listener.replaces(after=pause) for pause in (0, 3)]
