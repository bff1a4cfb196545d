"""How far a revocation has spread, and who lags."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from carnet.revocations import Revocation, RevocationKind
from carnet_broker.acknowledgements import Acknowledgements
from carnet_broker.core.rollout import VerifierSession
from carnet_broker.core.spread import Spread, delay_by_store, laggards_first, spread_of
from carnet_broker.ports import Acknowledged, Appended, Joined, Left, LogPosition

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def ms(number: float) -> timedelta:
    """Return milliseconds."""
    return timedelta(milliseconds=number)


def session(instance: str, **changes: Any) -> VerifierSession:  # noqa: ANN401 - its fields
    """Return a session that has generation 3 and version 5."""
    values: dict[str, Any] = {
        "spiffe_id": "spiffe://prod.example/ns/shop/sa/payments",
        "instance_id": instance,
        "audience": "payments",
        "replica_id": "one",
        "generation": 3,
        "generation_at": NOW - timedelta(minutes=1),
        "revocation_version": 5,
        "revocation_at": NOW,
        "max_staleness": timedelta(minutes=5),
    }
    return VerifierSession(**values | changes)


def test_who_has_a_version_or_a_later_one_has_loaded_it() -> None:
    """By the store, or by what was heard otherwise; the others are missing."""
    live = [session("store"), session("heard", revocation_version=1), session("behind", revocation_version=4)]
    heard = {"heard": 6}
    spread = spread_of(
        live, 5, heard=lambda one: heard.get(one.instance_id, 0), delay=lambda one: ms(len(one.instance_id))
    )
    assert (3, 2, ["behind"]) == (spread.live, spread.acknowledged, [one.instance_id for one in spread.missing])
    assert (ms(5), ms(5)) == spread.delays


def test_a_time_that_is_not_known_is_left_out() -> None:
    """No verifier, and none with a time, have no percentiles."""
    spread = spread_of([session("a")], 5, heard=lambda _: 0, delay=lambda _: None)
    assert (1, None, None) == (spread.acknowledged, spread.percentile(50), spread.percentile(100))


@pytest.mark.parametrize(("share", "expected"), [(0, 1), (1, 1), (50, 50), (99, 99), (100, 100)])
def test_a_percentile_is_of_the_nearest_rank(share: int, expected: int) -> None:
    """Of a hundred delays the fiftieth, the ninety-ninth and the last."""
    assert ms(expected) == Spread(100, (), tuple(map(ms, range(1, 101)))).percentile(share)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ms(250)),
        ({"revocation_at": NOW - ms(300)}, ms(0)),
        ({"generation_at": NOW}, None),
        ({"generation_at": NOW - ms(300), "revocation_at": NOW - ms(300)}, ms(0)),
    ],
)
def test_the_store_tells_the_time_of_who_was_there_before(changes: dict[str, Any], expected: timedelta | None) -> None:
    """One that came after the revocation has no time; no time is below zero."""
    assert expected == delay_by_store(session("a", **changes), NOW - ms(250))


def test_laggards_come_first() -> None:
    """Those without the generation, and those that a rotation left behind; then by what they have, and by name."""
    live = [
        session("b"),
        session("a"),
        session("old", generation=2),
        session("left", lagging=True),
        session("low", revocation_version=4),
    ]
    told = [(one.instance_id, lags) for one, lags in laggards_first(live, 3)]
    assert [("old", True), ("left", True), ("low", False), ("a", False), ("b", False)] == told


class _Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> datetime:
        return NOW

    def mono(self) -> float:
        return self.at


def _appended(version: int) -> Appended:
    entry = Revocation(version, RevocationKind.TOKEN, "3q2-7wAAAAAAAAAAAAAAAA", 0, NOW)
    return Appended((entry,), LogPosition(1, version, bytes(32)), NOW)


def _said(version: int, instance: str = "a") -> Acknowledged:
    return Acknowledged(session(instance).spiffe_id, instance, "stream", 3, version, timedelta(0))


def test_what_was_heard_here_is_exact() -> None:
    """The first acknowledgement of the version or a later one counts, also when later ones have come."""
    clock = _Clock()
    known = Acknowledgements(clock)
    passed_on: list[object] = []
    report = known.reporting(lambda change, told=None, *, soon=True: passed_on.append(change))
    key = (session("a").spiffe_id, "a")
    report(Joined(session("a"), "stream"), None)
    clock.at += 1
    known.durable(_appended(6))
    clock.at += 0.25
    report(_said(7), None)
    clock.at += 5
    report(_said(8), None)
    report(_said(8), None)
    assert (True, ms(250)) == known.delay(*key, 6)
    assert (8, 4) == (known.newest(*key), len(passed_on))
    assert (False, None) == known.delay(*key, 5), "that one was revoked elsewhere"
    known.hear(Joined(session("a"), "new"))
    assert (True, None) == known.delay(*key, 6), "after it came anew there is no time"
    report(Left(*key, "stream"), None)
    assert ((False, None), 0) == (known.delay(*key, 6), known.newest(*key))
    report(_said(9), None)
    assert 0 == known.newest(*key), "nothing is kept of one that has left"


def test_one_that_has_not_acknowledged_has_no_time() -> None:
    """It is known, and late."""
    clock = _Clock()
    known = Acknowledgements(clock)
    known.hear(Joined(session("a"), "stream"))
    clock.at += 1
    known.durable(_appended(6))
    durable = known.became_durable(6)
    assert durable is not None
    assert (NOW, 101.0) == (durable.at, durable.mono)
    assert (True, None) == known.delay(session("a").spiffe_id, "a", 6)


def test_what_is_remembered_is_bounded() -> None:
    """Old versions give way to new ones."""
    known = Acknowledgements(_Clock())
    for version in range(1, 1100):
        known.durable(_appended(version))
    assert known.became_durable(1) is None
    assert known.became_durable(1099) is not None
