"""Answers to those that poll for revocations: the same bytes for all who are at the same place, made once."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from carnet.revocations import GENESIS_DIGEST, Revocation, RevocationKind
from carnet.v1 import trust_pb2
from carnet_broker.core.watching import PART_ENTRIES, RevocationTail
from carnet_broker.edges.grpc import poll_answers
from carnet_broker.edges.grpc.poll_answers import PollAnswers
from carnet_broker.ports import LogPosition

ENDS = datetime(2026, 11, 24, 12, tzinfo=UTC)
START = LogPosition(7, 0, GENESIS_DIGEST)


def entries(count: int, first: int = 1) -> list[Revocation]:
    """Revoked tokens."""
    return [
        Revocation(version, RevocationKind.TOKEN, f"token-{version:016}", 0, ENDS + timedelta(hours=1))
        for version in range(first, first + count)
    ]


def tail_of(known: Sequence[Revocation]) -> RevocationTail:
    """A log that holds `known`."""
    tail = RevocationTail(START).followed_by(known)
    assert tail is not None
    return tail


def told(parts: Sequence[bytes]) -> list[int]:
    """The versions that an answer names."""
    changes = [trust_pb2.GetRevocationsResponse.FromString(part).change for part in parts]
    assert [True] * (len(changes) - 1) + [False] == [change.more for change in changes] or not changes
    return [entry.version for change in changes for entry in change.revocations]


@pytest.fixture(name="made")
def _made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries were encoded, call by call. The real encoding is done all the same."""
    counted: list[int] = []
    encode = poll_answers.change_message

    def counting(change):
        counted.append(len(change.entries))
        return encode(change)

    monkeypatch.setattr(poll_answers, "change_message", counting)
    return counted


def test_a_snapshot_is_encoded_once_for_all_who_ask_while_nothing_is_revoked(made):
    """Also for those at a place that leads nowhere: each of 20 callers gets the very same bytes."""
    known = entries(PART_ENTRIES + 3)
    tail, answers = tail_of(known), PollAnswers()
    peers = [None, LogPosition(6, 3, b"x" * 32), LogPosition(7, 3, b"x" * 32)] * 7
    got = [list(answers.leading_on(peer, tail, lambda: (tail.position, known))[1]) for peer in peers]
    assert all(parts == got[0] for parts in got)
    assert [one.version for one in known] == told(got[0])
    assert [PART_ENTRIES, 3] == made


def test_a_part_is_encoded_when_it_is_sent(made):
    """So one long answer is not one long turn: whoever breaks off has caused the first part alone."""
    known = entries(5 * PART_ENTRIES)
    tail = tail_of(known)
    _, parts = PollAnswers().leading_on(None, tail, lambda: (tail.position, known))
    assert [] == made
    next(parts)
    assert [PART_ENTRIES] == made


def test_who_is_at_a_place_of_the_log_gets_what_came_since_and_who_is_up_to_date_nothing(made):
    """A delta is shared like a snapshot; where the log has gone on, it is made anew."""
    known = entries(10)
    tail, answers = tail_of(known), PollAnswers()
    at = tail_of(known[:8]).position

    def everything() -> tuple[LogPosition, Sequence[Revocation]]:
        raise AssertionError

    for _ in range(3):
        to, parts = answers.leading_on(at, tail, everything)
        assert (tail.position, [9, 10]) == (to, told(list(parts)))
    to, parts = answers.leading_on(tail.position, tail, everything)
    assert (tail.position, []) == (to, list(parts))
    later = tail_of([*known, *entries(1, first=11)])
    to, parts = answers.leading_on(at, later, everything)
    assert (later.position, [9, 10, 11]) == (to, told(list(parts)))
    assert [2, 3] == made


def test_places_that_are_kept_are_bounded(made):
    """Whoever names one place after the other fills no memory: the oldest goes."""
    known = entries(100)
    tail, answers = tail_of(known), PollAnswers()
    for number in range(90):
        list(answers.leading_on(tail_of(known[:number]).position, tail, lambda: (tail.position, known))[1])
    assert poll_answers._CACHED == len(answers._kept)
    assert 90 == len(made)
