"""What a verifier that watches is sent next, and what it may say of itself: pure rules, each with its refusal."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carnet.revocations import GENESIS_DIGEST, Position, Revocation, RevocationKind, next_digest
from carnet_broker.core.watching import (
    FARTHEST_CLAIM,
    KEPT_ENTRIES,
    PART_ENTRIES,
    Hello,
    HelloError,
    Push,
    RevocationTail,
    Standing,
    change_from,
    check_hello,
    claim_is_possible,
    in_parts,
    is_silent,
    pushes,
    standing,
    told_from,
)
from carnet_broker.ports import LogPosition

END = datetime(2026, 11, 24, 13, tzinfo=UTC)
START = RevocationTail(LogPosition(5, 0, GENESIS_DIGEST))
HELLO = Hello("one", "payments", None, timedelta(minutes=5), accepts_stale=False)


def entries(first: int, last: int) -> list[Revocation]:
    """Entries of the log from one version to another."""
    return [
        Revocation(version, RevocationKind.TOKEN, f"token-number-{version:06}", 0, END)
        for version in range(first, last + 1)
    ]


def tail_at(version: int) -> RevocationTail:
    """The tail of a log with that many entries."""
    tail = START.followed_by(entries(1, version))
    assert tail is not None
    return tail


def at(tail: RevocationTail, generation: int = 3) -> Position:
    """The position of a verifier that has loaded all of `tail`."""
    here = tail.position
    return Position(here.epoch, generation, here.version, here.digest)


def snapshot_of(tail: RevocationTail):
    """What a replica returns that is at `tail`."""
    return lambda: (tail.position, tail.entries)


def no_snapshot() -> tuple[LogPosition, list[Revocation]]:
    """For who must not need one."""
    raise AssertionError


# -- the tail ----------------------------------------------------------------------------------------------------------


def test_the_digest_of_a_tail_is_the_chain_over_all_its_entries():
    """However they came, one by one or together."""
    digest = GENESIS_DIGEST
    for entry in entries(1, 3):
        digest = next_digest(digest, entry)
    one_by_one = START
    for entry in entries(1, 3):
        one_by_one = one_by_one.followed_by([entry])
    assert LogPosition(5, 3, digest) == tail_at(3).position == one_by_one.position


def test_entries_that_leave_a_gap_do_not_follow():
    """Nor those that are there already."""
    assert START.followed_by(entries(2, 3)) is None
    assert tail_at(3).followed_by(entries(3, 4)) is None
    assert tail_at(3).followed_by([]) == tail_at(3)


@given(st.integers(0, 12), st.integers(0, 12))
def test_what_came_since_a_version_is_all_and_nothing_else(here, there):
    """For each version up to ours; one that is ahead of us gets none of it."""
    tail, digest = tail_at(here), tail_at(there).position.digest
    expected = tuple(entries(there + 1, here)) if there <= here else None
    assert expected == tail.since(there, digest)


def test_another_digest_at_the_same_version_leads_nowhere():
    """Whoever has it knows something else."""
    assert tail_at(3).since(2, bytes(31) + b"x") is None
    assert tail_at(3).since(3, bytes(31) + b"x") is None


def test_only_the_last_entries_are_kept():
    """Who has been away for longer gets a snapshot; who is at the edge does not."""
    tail = tail_at(KEPT_ENTRIES + 2)
    assert KEPT_ENTRIES == len(tail.entries) == len(tail.digests)
    assert tail.since(1, tail_at(1).position.digest) is None
    assert KEPT_ENTRIES == len(tail.since(2, tail_at(2).position.digest))


# -- where a verifier is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Standing.FOLLOWS),
        ({"generation": 2}, Standing.FOLLOWS),
        ({"generation": 4}, Standing.AHEAD_IN_KEYRING),
        ({"revocation_version": 2}, Standing.FOLLOWS),
        ({"revocation_version": 4}, Standing.AHEAD_IN_VERSION),
        ({"epoch": 4, "revocation_version": 9}, Standing.FOLLOWS),
        ({"epoch": 6, "revocation_version": 1}, Standing.AHEAD_IN_EPOCH),
        ({"epoch": 4, "generation": 4}, Standing.AHEAD_IN_KEYRING),
    ],
)
def test_a_verifier_is_ahead_in_keyring_epoch_or_version_or_follows(change, expected):
    """An older epoch is never ahead, whatever its version."""
    tail = tail_at(3)
    assert expected is standing(replace(at(tail), **change), 3, tail.position)


def test_who_has_loaded_nothing_follows():
    """It can be told everything."""
    assert Standing.FOLLOWS is standing(None, 3, tail_at(3).position)


@pytest.mark.parametrize(
    ("epoch", "more", "possible"),
    [
        (5, 1, True),
        (5, FARTHEST_CLAIM, True),
        (5, FARTHEST_CLAIM + 1, False),
        (6, 3 * FARTHEST_CLAIM, True),
        (6, 3 * FARTHEST_CLAIM + 1, False),
        (9, 0, True),
        (10, 0, False),
    ],
)
def test_a_claim_is_possible_within_bounds_only(epoch, more, possible):
    """A restored store explains some; an epoch that has not begun yet nothing explains."""
    here = tail_at(3).position
    claim = Position(epoch, 1, here.version + more, GENESIS_DIGEST)
    assert possible is claim_is_possible(claim, here, latest_epoch=9)


# -- what it is sent ---------------------------------------------------------------------------------------------------


def test_who_has_nothing_gets_keys_and_a_snapshot_in_one_response():
    """Also where nothing is revoked: an empty snapshot says so."""
    for tail in (START, tail_at(3)):
        (push,) = pushes(None, 3, tail, snapshot_of(tail))
        assert (True, True, False) == (push.key_set, push.change.snapshot, push.change.more)
        assert (0, tail.position, tail.entries) == (push.change.from_version, push.change.to, push.change.entries)
        assert at(tail) == push.position


def test_who_is_up_to_date_gets_nothing():
    """A heartbeat is for the edge to make."""
    assert [] == pushes(at(tail_at(3)), 3, tail_at(3), no_snapshot)


def test_who_lacks_the_keys_gets_them_alone():
    """With the position that it has then."""
    assert [Push(at(tail_at(3)), key_set=True)] == pushes(at(tail_at(3), 2), 3, tail_at(3), no_snapshot)


def test_who_lacks_entries_gets_what_came_since():
    """A delta from its own version, without keys that it has."""
    (push,) = pushes(at(tail_at(1)), 3, tail_at(3), no_snapshot)
    assert (False, False, 1) == (push.key_set, push.change.snapshot, push.change.from_version)
    assert tuple(entries(2, 3)) == push.change.entries


@pytest.mark.parametrize("change", [{"epoch": 4}, {"revocation_digest": bytes(31) + b"x"}])
def test_who_is_of_another_epoch_or_digest_gets_a_snapshot(change):
    """What it has leads nowhere."""
    (push,) = pushes(replace(at(tail_at(2)), **change), 3, tail_at(3), snapshot_of(tail_at(3)))
    assert push.change.snapshot
    assert push.change.entries == tuple(entries(1, 3))


@pytest.mark.parametrize("generation", [1, 3])
@pytest.mark.parametrize("version", range(4))
def test_whom_a_delta_leads_on_is_told_from_where_it_is(version, generation):
    """Whether it has the newest keys or not."""
    peer = at(tail_at(version), generation)
    assert peer == told_from(peer, tail_at(3))


@pytest.mark.parametrize(
    "change", [{"epoch": 4}, {"epoch": 6}, {"revocation_digest": bytes(31) + b"x"}, {"revocation_version": 9}]
)
def test_whatever_leads_to_a_snapshot_is_told_what_one_with_nothing_is(change):
    """So a verifier that claims to be now here and now there has no snapshot made for each of its claims."""
    assert told_from(replace(at(tail_at(2)), **change), tail_at(3)) is None
    assert told_from(None, tail_at(3)) is None


def test_a_snapshot_that_is_newer_than_the_tail_leads_to_its_own_place():
    """Another thread may have gone on meanwhile."""
    (push,) = pushes(None, 3, tail_at(2), snapshot_of(tail_at(3)))
    assert at(tail_at(3)) == push.position


def test_a_large_change_comes_in_parts_that_all_lead_to_the_same_place():
    """Keys with the first; all but the last say that there is more."""
    tail = tail_at(2 * PART_ENTRIES + 1)
    sent = pushes(None, 3, tail, snapshot_of(tail))
    assert [True, False, False] == [push.key_set for push in sent]
    assert [True, True, False] == [push.change.more for push in sent]
    assert {at(tail)} == {push.position for push in sent}
    assert tail.entries == tuple(entry for push in sent for entry in push.change.entries)


def test_parts_are_bounded_in_bytes_too():
    """A subject can have 2 KiB."""
    long = [replace(entry, value="x" * 2048) for entry in entries(1, 100)]
    parts = in_parts(long)
    assert all(sum(len(entry.value) for entry in part) <= 32 * 1024 for part in parts)
    assert long == [entry for part in parts for entry in part]
    assert [()] == in_parts([])


def test_a_verifier_that_has_the_newest_entries_and_no_position_asks_for_all():
    """`change_from` of nothing is a snapshot, whatever is kept."""
    (change,) = change_from(None, tail_at(2), snapshot_of(tail_at(2)))
    assert change.snapshot


# -- what it says of itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "good",
    [
        {},
        {"instance_id": "a"},
        {"instance_id": "A-z_0.9" * 9},
        {"max_staleness": timedelta(days=1)},
        {"max_staleness": timedelta(milliseconds=100)},
        {"position": Position(0, 0, 0, GENESIS_DIGEST)},
        {"position": Position(2**53 - 1, 2**53 - 1, 2**53 - 1, b"x" * 32)},
    ],
)
def test_a_hello_within_bounds_is_taken(good):
    """At each bound."""
    check_hello(replace(HELLO, **good))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"instance_id": ""}, "instance_id"),
        ({"instance_id": "x" * 65}, "instance_id"),
        ({"instance_id": "a b"}, "instance_id"),
        ({"instance_id": "a\n"}, "instance_id"),
        ({"instance_id": "é"}, "instance_id"),
        ({"audience": ""}, "audience"),
        ({"audience": "a b"}, "audience"),
        ({"max_staleness": timedelta(0)}, "max_staleness"),
        ({"max_staleness": timedelta(seconds=-1)}, "max_staleness"),
        ({"max_staleness": timedelta(days=1, seconds=1)}, "max_staleness"),
        ({"position": Position(1, 1, 1, b"short")}, "position"),
        ({"position": Position(2**53, 1, 1, GENESIS_DIGEST)}, "position"),
        ({"position": Position(1, 2**53, 1, GENESIS_DIGEST)}, "position"),
        ({"position": Position(1, 1, 2**64 - 1, GENESIS_DIGEST)}, "position"),
    ],
)
def test_a_hello_out_of_bounds_is_refused_by_the_name_of_the_field(wrong, field):
    """Before anything is done for it."""
    with pytest.raises(HelloError, match=f"^{field}: "):
        check_hello(replace(HELLO, **wrong))


def test_a_verifier_is_silent_when_its_own_staleness_is_over():
    """At that moment it refuses all tokens."""
    assert not is_silent(10.0, 14.9, timedelta(seconds=5))
    assert is_silent(10.0, 15.0, timedelta(seconds=5))
