"""What may be revoked and how long that lasts; and how a restored store is found out."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from carnet.claims import Claims
from carnet.errors import InvalidRevocationError
from carnet.revocations import GENESIS_DIGEST, Revocation, RevocationKind
from carnet.spiffe import SpiffeID
from carnet_broker.core.lost_entries import is_behind, lost_entries
from carnet_broker.core.revocation import MAX_REASON, RevocationRules, new_revocation, revocation_of_token
from carnet_broker.ports import LogPosition, NewRevocation, RevocationPage

T0 = datetime(2026, 11, 24, 12, tzinfo=UTC)
RULES = RevocationRules(
    longest_life=timedelta(hours=1),
    max_leaf_life=timedelta(days=90),
    max_staleness=timedelta(minutes=5),
    leeway=timedelta(seconds=30),
    skew=timedelta(seconds=5),
)
MARGIN = timedelta(seconds=35)
JTI = "a-token-id-of-22-chars"
SUBJECT = "spiffe://prod.example/ns/shop/sa/orders"
CERTIFICATE = "sha256:" + "A" * 43
VALUES = {
    RevocationKind.TOKEN: JTI,
    RevocationKind.ROOT: JTI,
    RevocationKind.SUBJECT: SUBJECT,
    RevocationKind.BLOCK: SUBJECT,
    RevocationKind.LIFT: SUBJECT,
    RevocationKind.CERTIFICATE: CERTIFICATE,
}
CLAIMS = Claims(
    issuer="https://tokens.prod.example",
    subject=SpiffeID.parse(SUBJECT),
    audience="payments",
    client_id=SpiffeID.parse(SUBJECT),
    expires_at=T0 + timedelta(minutes=5),
    issued_at=T0,
    not_before=T0,
    token_id=JTI,
    scopes=("charge",),
    confirmation=None,
    revocation_version=0,
)


@pytest.mark.parametrize(
    ("kind", "life"),
    [
        (RevocationKind.TOKEN, timedelta(hours=1)),
        (RevocationKind.ROOT, timedelta(hours=1)),
        (RevocationKind.SUBJECT, timedelta(hours=1, minutes=5)),
        (RevocationKind.LIFT, timedelta(hours=1, minutes=5)),
        (RevocationKind.CERTIFICATE, timedelta(days=90)),
    ],
)
def test_an_entry_lasts_as_long_as_there_can_be_something_that_it_refuses(kind, life):
    """The longest life of what it names, and the margin for clocks."""
    entry = new_revocation(kind, VALUES[kind], now=T0, rules=RULES, by="someone", reason="stolen")
    assert T0 + life + MARGIN == entry.expires_at
    assert ("someone", "stolen", None) == (entry.by, entry.reason, entry.before_version)


def test_a_block_lasts_until_it_is_lifted():
    """It has no end."""
    assert new_revocation(RevocationKind.BLOCK, SUBJECT, now=T0, rules=RULES).expires_at is None


@pytest.mark.parametrize("kind", [RevocationKind.TOKEN, RevocationKind.ROOT, RevocationKind.CERTIFICATE])
def test_the_end_of_what_is_named_counts_where_it_is_known(kind):
    """In whole seconds, rounded up."""
    ends = T0 + timedelta(minutes=3, microseconds=1)
    entry = new_revocation(kind, VALUES[kind], now=T0, rules=RULES, ends_at=ends)
    assert T0 + timedelta(minutes=3, seconds=1) + MARGIN == entry.expires_at


@pytest.mark.parametrize(
    ("kind", "value", "more", "words"),
    [
        (RevocationKind.TOKEN, "short", {}, "cannot name"),
        (RevocationKind.SUBJECT, "orders", {}, "cannot name"),
        (RevocationKind.CERTIFICATE, "A" * 43, {}, "cannot name"),
        (RevocationKind.SUBJECT, SUBJECT, {"ends_at": T0 + timedelta(hours=1)}, "ends_at: a revocation of kind"),
        (RevocationKind.BLOCK, SUBJECT, {"ends_at": T0 + timedelta(hours=1)}, "ends_at: a revocation of kind"),
        (RevocationKind.TOKEN, JTI, {"ends_at": T0}, "ends_at: .* is over"),
        (RevocationKind.TOKEN, JTI, {"ends_at": T0 + timedelta(days=4000)}, "ends_at: .* farther away"),
        (RevocationKind.TOKEN, JTI, {"reason": "x" * (MAX_REASON + 1)}, "reason: "),
        (RevocationKind.TOKEN, JTI, {"reason": "two\nlines"}, "reason: "),
    ],
)
def test_what_cannot_be_revoked_is_refused_with_the_reason(kind, value, more, words):
    """A value that its kind cannot have, an end that cannot be, a reason that would not fit."""
    with pytest.raises(InvalidRevocationError, match=words):
        new_revocation(kind, value, now=T0, rules=RULES, **more)


def test_a_token_is_revoked_to_its_end_and_one_that_is_over_is_not():
    """Until nobody accepts it any more, margin included."""
    entry = revocation_of_token(CLAIMS, now=T0, rules=RULES, by=SUBJECT)
    expected = NewRevocation(
        kind=RevocationKind.TOKEN, value=JTI, expires_at=CLAIMS.expires_at + MARGIN, by=SUBJECT, reason=""
    )
    assert expected == entry
    last = CLAIMS.expires_at + MARGIN
    assert revocation_of_token(CLAIMS, now=last - timedelta(microseconds=1), rules=RULES) is not None
    assert revocation_of_token(CLAIMS, now=last, rules=RULES) is None


# -- a store that was restored -----------------------------------------------------------------------------------------

KEPT = Revocation(3, RevocationKind.TOKEN, JTI, 0, T0 + timedelta(hours=1))
BLOCK = Revocation(2, RevocationKind.BLOCK, SUBJECT, 2, None)
LIFT = Revocation(5, RevocationKind.LIFT, SUBJECT, 5, T0 + timedelta(hours=1))


def page(*entries: Revocation) -> RevocationPage:
    """A snapshot of the store."""
    return RevocationPage(LogPosition(7, 9, GENESIS_DIGEST), snapshot=True, entries=entries, read_at=T0)


@pytest.mark.parametrize(
    ("store", "seen", "expected"),
    [
        ((1, 5), (1, 5), False),
        ((1, 6), (1, 5), False),
        ((1, 4), (1, 5), True),
        ((1, 9), (2, 1), True),
        ((2, 9), (1, 9), False),
        ((2, 8), (1, 9), True),
        ((2, 0), (1, 9), True),
    ],
)
def test_a_store_is_behind_where_its_epoch_or_its_version_is(store, seen, expected):
    """A later epoch with lower versions is that of a store that was emptied: versions never go back."""
    assert expected is is_behind(LogPosition(*store, GENESIS_DIGEST), LogPosition(*seen, GENESIS_DIGEST))


def test_an_entry_that_the_snapshot_lacks_is_lost():
    """Unless it has ended by the store's clock."""
    ended = replace(KEPT, value="another-token-id-of-22", expires_at=T0)
    assert (KEPT,) == lost_entries(page(), [KEPT, ended])
    assert (BLOCK,) == lost_entries(page(KEPT), [KEPT, BLOCK])


def test_an_entry_that_was_entered_anew_or_outdone_is_not_lost():
    """Its version says nothing, and a LIFT ends a BLOCK."""
    assert () == lost_entries(page(replace(KEPT, version=1_000_003)), [KEPT])
    assert () == lost_entries(page(LIFT), [BLOCK])
    assert () == lost_entries(page(), [])
