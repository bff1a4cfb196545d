"""What a verifier loads of what a broker says, what it refuses, and how fresh it holds itself."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from carnet.jwk import KeySet, PublicJWK
from carnet.keysets import KeySetRules, Moment, Supply
from carnet.revocations import GENESIS_DIGEST, Position, Revocation, RevocationKind, next_digest
from carnet.trust_messages import (
    MAX_CHANGE_BYTES,
    MAX_CHANGE_TIME,
    MAX_ENTRIES,
    Answer,
    Change,
    Goodbye,
    PartCollector,
    PushedKeys,
    RefusedResponseError,
    Response,
)
from carnet.trust_state import (
    MAX_EPOCH_AHEAD,
    MAX_GENERATION_JUMP,
    MAX_VERSION_JUMP,
    Outcome,
    TrustState,
)
from carnet.watch_protocol import WatchProtocol

ISSUER = "https://tokens.prod.example"
START = Moment(1000.0, datetime(2026, 11, 24, 12, 0, tzinfo=UTC))
KEYS = KeySet.of([PublicJWK.of(ec.generate_private_key(ec.SECP256R1()).public_key())])
OTHER_KEYS = KeySet.of([PublicJWK.of(ec.generate_private_key(ec.SECP256R1()).public_key())])
ORDERS = "spiffe://prod.example/ns/shop/sa/orders"
HOUR = timedelta(hours=1)
EPOCH = 1_700_000_000_000


def at(seconds: float) -> Moment:
    """Return the moment so many seconds after START, by both clocks."""
    return Moment(START.monotonic + seconds, START.wall + timedelta(seconds=seconds))


def new_state(**rules: Any) -> TrustState:  # noqa: ANN401 - those of KeySetRules
    """Return the state of a verifier that knows nothing yet."""
    return TrustState(KeySetRules(**rules), issuer=ISSUER, now=START, follows_revocations=True)


def entry(version: int, kind: RevocationKind = RevocationKind.TOKEN, value: str = "", seconds: float = 3600):
    """Return a revocation that ends so many seconds after START."""
    by_version = kind in {RevocationKind.SUBJECT, RevocationKind.BLOCK, RevocationKind.LIFT}
    ends = None if kind is RevocationKind.BLOCK else at(seconds).wall
    named = value or (ORDERS if by_version else f"token-{version:016d}")
    return Revocation(version, kind, named, version if by_version else 0, ends)


def digest_of(log: list[Revocation]) -> bytes:
    """Return the running digest of a whole log."""
    digest = GENESIS_DIGEST
    for one in log:
        digest = next_digest(digest, one)
    return digest


def response(
    log: list[Revocation],
    *,
    since: int | None = None,
    epoch: int = EPOCH,
    generation: int = 1,
    keys: KeySet | None = None,
    age: float = 0,
    **more: Any,  # noqa: ANN401 - those of Response
) -> Response:
    """Return what a broker with `log` says to a verifier at version `since` (None: a snapshot)."""
    to = log[-1].version if log else 0
    change = Change(
        since or 0,
        to,
        digest_of(log),
        since is None,
        more=False,
        entries=tuple(e for e in log if e.version > (since or 0)),
    )
    pushed = None if keys is None else PushedKeys(ISSUER, generation, keys, timedelta(minutes=5))
    values = {
        "position": Position(epoch, generation, to, digest_of(log)),
        "age": timedelta(seconds=age),
        "heartbeat": timedelta(seconds=15),
        "keys": pushed,
        "change": change,
    }
    return Response(**values | more)


def heartbeat(log: list[Revocation], **more: Any) -> Response:  # noqa: ANN401 - those of Response
    """Return a response without key set and change."""
    return response(log, **{"change": None} | more)


def loaded(log: list[Revocation], **rules: Any) -> TrustState:  # noqa: ANN401 - those of KeySetRules
    """Return the state of a verifier that has loaded a snapshot at START."""
    state = new_state(**rules)
    assert Outcome.LOADED is state.apply(response(log, keys=KEYS), asked_at=START, now=START)
    return state


def known(state: TrustState) -> tuple[int, ...]:
    """Return the versions of the revocations at hand."""
    return tuple(one.version for one in state.revocations.entries())


LOG = [entry(1), entry(2), entry(3)]


# -- loading -----------------------------------------------------------------------------------------------------------


def test_a_snapshot_and_then_a_delta_are_loaded():
    """The position is that of the broker, and the revision says that something changed."""
    state = new_state()
    assert state.position is None
    assert None is state.keys.usable(START)
    assert Outcome.LOADED is state.apply(response(LOG[:2], keys=KEYS), asked_at=START, now=START)
    assert Position(EPOCH, 1, 2, digest_of(LOG[:2])) == state.position
    before = state.revision
    assert Outcome.LOADED is state.apply(response(LOG, since=2), asked_at=at(1), now=at(1))
    assert ((1, 2, 3), before + 1) == (known(state), state.revision)
    assert Position(EPOCH, 1, 3, digest_of(LOG)) == state.position
    assert KEYS is state.keys.usable(at(1))


def test_an_empty_log_is_something_to_know():
    """A broker that never revoked anything tells so: then the verifier may decide."""
    state = loaded([])
    assert (Position(EPOCH, 1, 0, GENESIS_DIGEST), ()) == (state.position, known(state))
    assert KEYS is state.keys.usable(START)


def test_a_heartbeat_is_fresh_and_changes_nothing():
    """It says that what is at hand is what there is."""
    state = loaded(LOG)
    revision = state.revision
    assert Outcome.CURRENT is state.apply(heartbeat(LOG, age=2), asked_at=at(100), now=at(103))
    assert (timedelta(seconds=5), revision) == (state.keys.staleness(at(103)), state.revision)


def test_a_new_key_set_is_loaded_beside_a_delta_or_alone():
    """Both halves of one response, and one half alone."""
    state = loaded(LOG[:2])
    both = response(LOG, since=2, generation=2, keys=OTHER_KEYS)
    assert Outcome.LOADED is state.apply(both, asked_at=at(1), now=at(1))
    alone = heartbeat(LOG, generation=3, keys=KEYS)
    assert Outcome.LOADED is state.apply(alone, asked_at=at(2), now=at(2))
    assert (3, KEYS) == (state.keys.generation, state.keys.usable(at(2)))


def test_knowledge_that_is_too_old_decides_nothing():
    """Age and the time since it was asked for, together; the older half counts."""
    state = loaded(LOG, max_staleness=timedelta(seconds=60))
    assert KEYS is state.keys.usable(at(60))
    assert None is state.keys.usable(at(60.5))
    state.apply(heartbeat(LOG, age=50), asked_at=at(60), now=at(60))
    assert KEYS is state.keys.usable(at(70))
    assert None is state.keys.usable(at(70.5))


def test_an_older_word_never_makes_what_is_at_hand_older():
    """A response that was on its way for long says less than the one before it."""
    state = loaded(LOG)
    state.apply(heartbeat(LOG), asked_at=at(100), now=at(100))
    state.apply(heartbeat(LOG), asked_at=at(10), now=at(101))
    assert timedelta(seconds=1) == state.keys.staleness(at(101))


def test_what_is_over_is_dropped_once_a_minute_and_by_no_clock_that_jumps_ahead():
    """The wall clock a day ahead cleans nothing away; the time that passed does."""
    state = loaded([entry(1, seconds=30), entry(2)])
    jumped = Moment(at(61).monotonic, at(61).wall + timedelta(days=1))
    state.apply(heartbeat([entry(1, seconds=30), entry(2)]), asked_at=jumped, now=jumped)
    assert (2,) == known(state)


# -- never lower -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("since", [None, 1, 2])
def test_a_replica_that_has_fewer_revocations_changes_nothing(since: int | None):
    """Snapshot, delta that was loaded before, heartbeat: what is at hand stays, and gets no fresher."""
    state = loaded(LOG)
    behind = response(LOG[:2], since=since) if since != 2 else heartbeat(LOG[:2])
    assert Outcome.BEHIND is state.apply(behind, asked_at=at(50), now=at(50))
    assert ((1, 2, 3), 3) == (known(state), state.position.revocation_version)
    assert timedelta(seconds=50) == state.keys.staleness(at(50))


def test_a_delta_that_came_twice_is_loaded_once():
    """The second one is behind."""
    state = loaded(LOG[:2])
    state.apply(response(LOG, since=2), asked_at=at(1), now=at(1))
    assert Outcome.BEHIND is state.apply(response(LOG, since=2), asked_at=at(2), now=at(2))
    assert (1, 2, 3) == known(state)


def test_an_older_key_set_is_not_loaded_and_the_revocations_beside_it_are():
    """One half that is behind does not keep the other away."""
    state = loaded(LOG[:2])
    state.apply(heartbeat(LOG[:2], generation=5, keys=OTHER_KEYS), asked_at=at(1), now=at(1))
    behind = response(LOG, since=2, generation=4, keys=KEYS)
    assert Outcome.BEHIND is state.apply(behind, asked_at=at(10), now=at(10))
    assert (5, OTHER_KEYS, (1, 2, 3)) == (state.keys.generation, state.keys.usable(at(10)), known(state))
    assert timedelta(seconds=9) == state.keys.staleness(at(10))


def test_a_lower_epoch_is_refused_whatever_it_brings():
    """A replica that has not seen the restore yet."""
    state = loaded(LOG)
    lower = response([*LOG, entry(4)], epoch=EPOCH - 1, generation=9, keys=OTHER_KEYS)
    assert Outcome.BEHIND is state.apply(lower, asked_at=at(9), now=at(9))
    assert (EPOCH, 1, (1, 2, 3)) == (state.position.epoch, state.keys.generation, known(state))


# -- gaps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gap",
    [
        response([*LOG, entry(4), entry(5)], since=4),
        response([*LOG, entry(4)], since=2),
        response([*LOG[:2], entry(3, value="another-token-0003"), entry(4)], since=3),
        heartbeat([*LOG, entry(4)]),
        heartbeat([*LOG[:2], entry(3, value="another-token-0003")]),
        heartbeat(LOG, generation=2),
        response(LOG, since=2, epoch=EPOCH + 1),
        heartbeat(LOG, epoch=EPOCH + 1),
        replace(
            response([*LOG, entry(4), entry(5)], since=3),
            change=Change(3, 5, digest_of([*LOG, entry(4), entry(5)]), snapshot=False, more=False, entries=(entry(4),)),
        ),
        replace(
            response([*LOG, entry(4), entry(5)], since=3),
            change=Change(
                3, 5, digest_of([*LOG, entry(4), entry(5)]), snapshot=False, more=False, entries=(entry(5), entry(4))
            ),
        ),
    ],
    ids=[
        "from later",
        "from earlier",
        "another chain",
        "nothing given",
        "another digest",
        "no key set given",
        "delta of a new epoch",
        "new epoch and nothing",
        "an entry is missing",
        "entries in another order",
    ],
)
def test_k15_what_does_not_follow_is_a_gap_and_everything_is_asked_for(gap: Response):
    """Nothing of it is loaded, and the next Hello names no position."""
    state = loaded(LOG)
    with pytest.raises(RefusedResponseError) as refused:
        state.apply(gap, asked_at=at(1), now=at(1))
    assert refused.value.gap
    assert ((1, 2, 3), True) == (known(state), state.wants_all)
    protocol = WatchProtocol(state, instance_id="i", audience="payments", accepts_stale=False)
    assert None is protocol.hello(at(2)).position
    state.apply(response([*LOG, entry(4)], keys=KEYS), asked_at=at(2), now=at(2))
    assert ((1, 2, 3, 4), False) == (known(state), state.wants_all)


def test_a_snapshot_takes_no_revocation_away_but_a_block_that_it_does_not_name():
    """Within an epoch a block that is gone was lifted; a token that is gone is kept until it ends."""
    block = entry(2, RevocationKind.BLOCK)
    log = [entry(1), block, entry(3)]
    state = loaded(log)
    later = response([*log, entry(4)])
    only_the_last = replace(later, change=replace(later.change, entries=(entry(4),)))
    state.apply(only_the_last, asked_at=at(1), now=at(1))
    assert (1, 3, 4) == known(state)


def test_a_new_epoch_is_a_snapshot_united_with_what_is_at_hand_blocks_included():
    """The store was restored from before our last revocations: none is lost, and somebody can see it."""
    block = entry(2, RevocationKind.BLOCK)
    log = [entry(1), block, entry(3, seconds=10)]
    state = loaded(log)
    assert 0 == state.new_epochs
    new = response([entry(1_000_003)], epoch=EPOCH + 1)
    assert Outcome.LOADED is state.apply(new, asked_at=at(20), now=at(20))
    assert ((1, 2, 1_000_003), 1) == (known(state), state.new_epochs)
    assert (EPOCH + 1, 1_000_003) == (state.position.epoch, state.position.revocation_version)


def test_in_a_new_epoch_the_keyring_may_be_an_older_one_if_it_is_given():
    """Vault was restored too: the set that the brokers have is the one that counts. Without it, it is a gap."""
    state = loaded(LOG)
    state.apply(heartbeat(LOG, generation=7, keys=OTHER_KEYS), asked_at=at(1), now=at(1))
    with pytest.raises(RefusedResponseError, match="gave none"):
        state.apply(response(LOG, epoch=EPOCH + 1, generation=3), asked_at=at(2), now=at(2))
    assert Outcome.LOADED is state.apply(
        response(LOG, epoch=EPOCH + 1, generation=3, keys=KEYS), asked_at=at(3), now=at(3)
    )
    assert (3, KEYS) == (state.keys.generation, state.keys.usable(at(3)))


# -- what cannot be ----------------------------------------------------------------------------------------------------

GOOD = response([*LOG, entry(4)], since=3)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(GOOD, age=timedelta(seconds=-1)),
        replace(GOOD, position=replace(GOOD.position, epoch=0)),
        replace(GOOD, position=replace(GOOD.position, revocation_version=5)),
        replace(GOOD, position=replace(GOOD.position, revocation_digest=bytes(32))),
        replace(
            GOOD,
            position=replace(GOOD.position, revocation_digest=b"x"),
            change=replace(GOOD.change, to_digest=b"x"),
        ),
        replace(GOOD, change=replace(GOOD.change, entries=(replace(entry(4), value="short"),))),
        replace(GOOD, change=replace(GOOD.change, entries=(entry(5),))),
        replace(GOOD, change=replace(GOOD.change, entries=(entry(4),) * (MAX_ENTRIES + 1))),
        replace(GOOD, keys=PushedKeys(ISSUER, 2, OTHER_KEYS, timedelta(minutes=5))),
        replace(GOOD, keys=PushedKeys("https://tokens.staging.example", 1, OTHER_KEYS, timedelta(minutes=5))),
        replace(GOOD, keys=PushedKeys(ISSUER, 1, OTHER_KEYS, timedelta())),
    ],
    ids=[
        "negative age",
        "no epoch",
        "another version",
        "another digest",
        "a digest that is none",
        "an entry that cannot be",
        "an entry from beyond",
        "too many entries",
        "another generation",
        "another issuer",
        "no max-age",
    ],
)
def test_k15_a_response_with_anything_in_it_that_cannot_be_is_refused_whole(wrong: Response):
    """Neither half is loaded, and no snapshot is asked for: it is the broker that is wrong."""
    state = loaded(LOG)
    with pytest.raises(RefusedResponseError) as refused:
        state.apply(wrong, asked_at=at(1), now=at(1))
    assert not refused.value.gap
    assert ((1, 2, 3), 1, KEYS) == (known(state), state.keys.generation, state.keys.usable(START))
    assert Outcome.LOADED is state.apply(GOOD, asked_at=at(1), now=at(1))


# -- polls -------------------------------------------------------------------------------------------------------------


def test_k15_an_epoch_far_ahead_is_a_lie_unless_the_clock_here_is_behind():
    """A day ahead is believed. The refusal names both clocks; with the clock set right the same answer is loaded."""
    begins = int(START.wall.timestamp() * 1000) + MAX_EPOCH_AHEAD // timedelta(milliseconds=1)
    for state in (new_state(), loaded(LOG)):
        before = state.position
        with pytest.raises(
            RefusedResponseError, match=r"24 hours ahead .* \(2026-11-24T12:00:00Z\): set that clock"
        ) as no:
            state.apply(response(LOG, keys=KEYS, epoch=begins + 1), asked_at=START, now=START)
        assert (False, before, False) == (no.value.gap, state.position, state.wants_all)
        assert Outcome.LOADED is state.apply(response(LOG, keys=KEYS, epoch=begins + 1), asked_at=at(1), now=at(1))
    state = new_state()
    assert Outcome.LOADED is state.apply(response(LOG, keys=KEYS, epoch=begins), asked_at=START, now=START)


def test_a_clock_that_is_set_back_does_not_lock_out_of_the_epoch_that_is_loaded():
    """Only a new epoch is looked at."""
    state = loaded(LOG)
    back = Moment(START.monotonic + 1, datetime(2001, 1, 1, tzinfo=UTC))
    assert Outcome.LOADED is state.apply(response([*LOG, entry(4)], since=3), asked_at=back, now=back)


@pytest.mark.parametrize("what", ["generation", "revocation"])
def test_k15_a_jump_that_no_broker_can_have_made_is_refused(what: str):
    """To the bound and no further within an epoch; a new epoch may begin anywhere that is a number for all."""
    most = MAX_GENERATION_JUMP if what == "generation" else MAX_VERSION_JUMP

    def jump(by: int, **more: Any) -> Response:  # noqa: ANN401 - those of Response
        told = response([entry(3 + by)] if what == "revocation" else LOG, keys=KEYS, **more)
        if what == "revocation":
            return told
        position = replace(told.position, generation=1 + by)
        return replace(told, position=position, keys=replace(told.keys, generation=1 + by))

    state = loaded(LOG)
    before = state.position
    with pytest.raises(RefusedResponseError, match=f"{what} .* it cannot have had more than {most} since"):
        state.apply(jump(most + 1), asked_at=START, now=START)
    assert before == state.position
    assert Outcome.LOADED is state.apply(jump(most), asked_at=START, now=START)
    assert Outcome.LOADED is loaded(LOG).apply(jump(most + 1, epoch=EPOCH + 1), asked_at=START, now=START)
    with pytest.raises(RefusedResponseError, match="the broker names generation"):
        loaded(LOG).apply(jump(2**53, epoch=EPOCH + 1), asked_at=START, now=START)


def test_what_is_too_old_to_decide_is_no_measure_of_a_jump():
    """A process that was suspended for months has missed any number of revocations: it may learn of them."""
    far = response([entry(3 + MAX_VERSION_JUMP + 1, seconds=7200)], keys=KEYS)
    state = loaded(LOG)
    with pytest.raises(RefusedResponseError, match="cannot have had"):
        state.apply(far, asked_at=at(300), now=at(300))
    assert Outcome.LOADED is state.apply(far, asked_at=at(301), now=at(301))


def test_an_answer_to_a_poll_says_nothing_of_keys():
    """Its generation is neither a gap nor fresh: keys have an answer of their own."""
    state = loaded(LOG)
    assert Outcome.LOADED is state.apply(
        response([*LOG, entry(4)], since=3, generation=9), asked_at=at(10), now=at(10), of_keys=False
    )
    assert ((1, 2, 3, 4), 1) == (known(state), state.keys.generation)
    assert timedelta(seconds=10) == state.keys.staleness(at(10)), "that of the keys"


# -- parts -------------------------------------------------------------------------------------------------------------


def parts_of(whole: Response) -> list[Response]:
    """Return a response in one part for each entry; the key set comes with the first."""
    last = len(whole.change.entries) - 1
    return [
        replace(
            whole,
            keys=whole.keys if number == 0 else None,
            change=replace(whole.change, entries=(one,), more=number < last),
        )
        for number, one in enumerate(whole.change.entries)
    ]


def test_a_change_in_parts_is_whole_with_its_last_part_and_as_fresh_as_its_first():
    """Three parts: nothing twice, then the whole; the moment is that of the first, the age the greatest."""
    collector = PartCollector()
    first, second, third = parts_of(response(LOG, keys=KEYS))
    assert None is collector.add(replace(first, age=timedelta(seconds=3)), at(1), at(1))
    assert None is collector.add(second, at(2), at(2))
    whole, asked_at = collector.add(third, at(3), at(3))
    assert (tuple(LOG), at(1)) == (whole.change.entries, asked_at)
    assert (timedelta(seconds=3), KEYS) == (whole.age, whole.keys.keys)
    assert (third, at(4)) == collector.add(third, at(4), at(4)), "one that is whole by itself"
    assert (heartbeat(LOG), at(5)) == collector.add(heartbeat(LOG), at(5), at(5))


@pytest.mark.parametrize(
    "other",
    [
        parts_of(response(LOG, since=1))[-1],
        parts_of(response(LOG, epoch=EPOCH + 1))[-1],
        parts_of(response(LOG[:2]))[-1],
        replace(
            parts_of(response(LOG))[-1],
            change=replace(parts_of(response(LOG))[-1].change, entries=(entry(3),) * (MAX_ENTRIES + 1)),
        ),
    ],
    ids=["a delta", "of another epoch", "to a lower version", "too many"],
)
def test_parts_that_do_not_belong_together_are_refused(other: Response):
    """And what was collected is forgotten."""
    collector = PartCollector()
    assert None is collector.add(parts_of(response(LOG))[0], START, START)
    with pytest.raises(RefusedResponseError):
        collector.add(other, START, START)
    whole = response(LOG)
    assert (whole, START) == collector.add(whole, START, START)


@pytest.mark.parametrize(
    ("size", "seconds", "entries", "message"),
    [
        (MAX_CHANGE_BYTES // 2 + 1, 1, (entry(2),), "bytes"),
        (1, MAX_CHANGE_TIME.total_seconds() + 1, (entry(2),), "has not ended 0:02:00 after its first part"),
        (1, 1, (), "no entries, and says that more will come"),
        (1, 1, (entry(2),) * MAX_ENTRIES, "1000000 entries"),
    ],
    ids=["bytes", "time", "nothing in it", "entries"],
)
def test_k15_a_change_that_goes_on_and_on_is_refused(
    size: int, seconds: float, entries: tuple[Revocation, ...], message: str
):
    """Each bound: bytes, time, entries, and parts that bring nothing. What was collected is forgotten."""
    collector = PartCollector()
    part = replace(parts_of(response(LOG))[0], size=size)
    assert None is collector.add(part, START, START)
    with pytest.raises(RefusedResponseError, match=message):
        collector.add(replace(part, change=replace(part.change, entries=entries)), START, at(seconds))
    assert None is collector.add(part, START, at(seconds)), "as the first part of another change"


def test_k15_a_change_at_its_bounds_is_taken():
    """Bytes and time are exactly what is allowed; the last part may be an empty one."""
    collector = PartCollector()
    part = replace(parts_of(response(LOG))[0], size=MAX_CHANGE_BYTES // 2)
    assert None is collector.add(part, START, START)
    end = replace(part, change=replace(part.change, entries=(), more=False))
    whole, _ = collector.add(end, START, at(MAX_CHANGE_TIME.total_seconds()))
    assert (entry(1),) == whole.change.entries


def test_k15_a_change_that_a_broker_never_ends_holds_no_stream_by_its_heartbeats():
    """Heartbeats come between the parts, and the end does not: the broker is left when the time is over."""
    protocol = protocol_of(loaded(LOG))
    protocol.hello(START)
    more = [*LOG, entry(4), entry(5)]
    assert Outcome.PART is protocol.receive(parts_of(response(more, since=3))[0], at(1))
    protocol.receive(heartbeat(LOG), at(60))
    with pytest.raises(RefusedResponseError, match="has not ended"):
        protocol.receive(heartbeat(LOG), at(2 + MAX_CHANGE_TIME.total_seconds()))


# -- the protocol ------------------------------------------------------------------------------------------------------


def protocol_of(state: TrustState, *, accepts_stale: bool = False) -> WatchProtocol:
    """Return a stream of the state."""
    return WatchProtocol(state, instance_id="instance-1", audience="payments", accepts_stale=accepts_stale)


def test_a_hello_says_who_asks_and_from_where():
    """Position and budget; nothing loaded is no position."""
    hello = protocol_of(new_state(max_staleness=timedelta(seconds=90)), accepts_stale=True).hello(START)
    assert ("instance-1", "payments", None, timedelta(seconds=90), True) == (
        hello.instance_id,
        hello.audience,
        hello.position,
        hello.max_staleness,
        hello.accepts_stale,
    )
    state = loaded(LOG)
    assert state.position == protocol_of(state).hello(START).position


def test_who_decides_for_longer_than_a_day_counts_as_one_that_accepts_what_is_stale():
    """No broker waits so long."""
    hello = protocol_of(new_state(max_staleness=timedelta(days=2))).hello(START)
    assert (timedelta(days=1), True) == (hello.max_staleness, hello.accepts_stale)
    hello = protocol_of(new_state(max_staleness=timedelta(days=1))).hello(START)
    assert (timedelta(days=1), False) == (hello.max_staleness, hello.accepts_stale)


def test_what_is_told_is_as_fresh_as_the_answer_that_the_broker_had():
    """A response that lay in a buffer for minutes names an old answer, and so does not look fresh."""
    state = new_state()
    protocol = protocol_of(state)
    protocol.hello(at(0))
    protocol.receive(response(LOG, keys=KEYS), at(30))
    assert timedelta(seconds=30) == state.keys.staleness(at(30)), "since the Hello"
    assert Answer(1, state.position) == protocol.answer(at(31))
    protocol.receive(heartbeat(LOG), at(200))
    assert timedelta(seconds=200) == state.keys.staleness(at(200)), "answer 1 was not there yet"
    protocol.answer(at(201))
    protocol.receive(heartbeat(LOG, answered=2, age=1), at(202))
    assert timedelta(seconds=2) == state.keys.staleness(at(202))
    assert Goodbye() == protocol.goodbye()


@pytest.mark.parametrize("answered", [2, 5])
def test_an_answer_that_was_never_given_cannot_have_been_had(answered: int):
    """A broker that claims so would make old knowledge look fresh; so does one that goes back."""
    protocol = protocol_of(new_state())
    protocol.hello(START)
    protocol.receive(response(LOG, keys=KEYS), START)
    protocol.answer(at(1))
    with pytest.raises(RefusedResponseError, match="1 were given"):
        protocol.receive(heartbeat(LOG, answered=answered), at(2))


def test_the_answer_that_the_broker_had_never_goes_back():
    """After answer 1, answer 0 is not known any more."""
    protocol = protocol_of(loaded(LOG))
    protocol.hello(START)
    protocol.answer(at(1))
    protocol.receive(heartbeat(LOG, answered=1), at(2))
    with pytest.raises(RefusedResponseError):
        protocol.receive(heartbeat(LOG, answered=0), at(3))


def test_parts_are_answered_and_loaded_with_the_last():
    """The supply is the stream from the first part on."""
    state = new_state()
    state.keys.supply = Supply.AWAIT
    protocol = protocol_of(state)
    protocol.hello(START)
    first, second, third = parts_of(response(LOG, keys=KEYS))
    assert [Outcome.PART, Outcome.PART] == [protocol.receive(part, at(1)) for part in (first, second)]
    assert Answer(1, None) == protocol.answer(at(1))
    assert Outcome.LOADED is protocol.receive(third, at(2))
    assert (Supply.PUSH, (1, 2, 3)) == (state.keys.supply, known(state))


def test_patience_is_two_heartbeats_and_some():
    """At most two minutes; a heartbeat of nothing cannot be."""
    protocol = protocol_of(loaded(LOG))
    protocol.hello(START)
    for told, patience in ((15, 31), (1, 3), (3600, 121)):
        protocol.receive(heartbeat(LOG, heartbeat=timedelta(seconds=told), live=True), at(1))
        assert (timedelta(seconds=patience), True) == (protocol.patience, protocol.live)
    with pytest.raises(RefusedResponseError, match="heartbeat"):
        protocol.receive(heartbeat(LOG, heartbeat=timedelta()), at(2))


def test_a_broker_that_is_behind_from_the_start_is_left():
    """It was told where this side is: another replica is asked."""
    protocol = protocol_of(loaded(LOG))
    protocol.hello(START)
    with pytest.raises(RefusedResponseError, match="lags"):
        protocol.receive(heartbeat(LOG[:2]), at(1))


def test_a_broker_that_falls_behind_has_a_moment_to_catch_up():
    """Another replica was asked for a key meanwhile; what it said reaches this one within its next look."""
    state = loaded(LOG)
    protocol = protocol_of(state)
    protocol.hello(START)
    protocol.receive(heartbeat(LOG), at(1))
    state.keys.load(replace(state.keys.snapshot, generation=2))
    assert Outcome.BEHIND is protocol.receive(heartbeat(LOG), at(2))
    assert Outcome.BEHIND is protocol.receive(heartbeat(LOG), at(3))
    assert Outcome.CURRENT is protocol.receive(heartbeat(LOG, generation=2), at(3.5))
    assert Outcome.BEHIND is protocol.receive(heartbeat(LOG), at(10))
    with pytest.raises(RefusedResponseError, match="lags"):
        protocol.receive(heartbeat(LOG), at(12))


# -- what outlives the process -----------------------------------------------------------------------------------------


def test_what_was_saved_is_where_the_next_process_begins():
    """Same position, same revocations, same keys, and as old as it was."""
    assert None is new_state().saved(START)
    state = loaded(LOG)
    saved = state.saved(at(40))
    other = new_state()
    other.restore(replace(saved, age=timedelta(seconds=100)), at(60))
    assert (state.position, known(state)) == (other.position, known(other))
    assert (KEYS, timedelta(seconds=100)) == (other.keys.usable(at(60)), other.keys.staleness(at(60)))
    assert Outcome.LOADED is other.apply(response([*LOG, entry(4)], since=3), asked_at=at(61), now=at(61))


def test_keys_alone_are_not_worth_keeping():
    """Without revocations the next process could not decide."""
    state = new_state()
    state.keys.load(replace(loaded(LOG).keys.snapshot))
    assert None is state.saved(START)


def test_status_is_one_value_for_health_pages():
    """Numbers where something is loaded, zero and None where nothing is."""
    empty = new_state().status(START, target=None, live=True, last_error="the connection is closed")
    assert (0, 0, 0, 0, None, False, "poll", None, False, 0, "the connection is closed") == (
        empty.epoch,
        empty.generation,
        empty.revocation_version,
        empty.revocations,
        empty.staleness,
        empty.usable,
        empty.supply,
        empty.target,
        empty.live,
        empty.new_epochs,
        empty.last_error,
    )
    full = loaded(LOG).status(at(5), target="b:8444", live=True)
    assert (EPOCH, 1, 3, 3, timedelta(seconds=5), True, "b:8444", True) == (
        full.epoch,
        full.generation,
        full.revocation_version,
        full.revocations,
        full.staleness,
        full.usable,
        full.target,
        full.live,
    )
