"""Entries of a restored store whose `before_version` is below the `rv` of tokens that are out already."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from carnet.revocations import Revocation, RevocationKind
from carnet_broker.core.lost_entries import as_they_were, outrun_entries, raised

T0 = datetime(2026, 11, 24, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
ALICE = "spiffe://prod.example/sa/alice"
BOB = "spiffe://prod.example/sa/bob"
SUBJECT = Revocation(5, RevocationKind.SUBJECT, ALICE, 5, T0 + HOUR)
LIFT = replace(SUBJECT, kind=RevocationKind.LIFT, value=BOB)
BLOCK = Revocation(5, RevocationKind.BLOCK, ALICE, 5, None)
TOKEN = Revocation(6, RevocationKind.TOKEN, "a-token-id-of-22-chars", 0, T0 + HOUR)


def outrun(*held: Revocation, own: tuple[Revocation, ...] = (), seen: int = 9) -> tuple[Revocation, ...]:
    """What is outrun at T0."""
    return outrun_entries(held, own, seen=seen, now=T0)


def test_what_names_tokens_by_rv_and_is_not_known_is_outrun():
    """A token and a block are refused whatever the version, and what has ended refuses nothing."""
    assert (SUBJECT, LIFT) == outrun(SUBJECT, LIFT, BLOCK, TOKEN, replace(SUBJECT, expires_at=T0))


def test_what_is_known_is_not_outrun_under_any_version():
    """Nor what comes before something that is known: that was read with it. What comes after it was not."""
    assert () == outrun(SUBJECT, own=(SUBJECT,))
    assert () == outrun(replace(SUBJECT, version=1_000_001), own=(SUBJECT,))
    assert () == outrun(SUBJECT, TOKEN, own=(TOKEN,))
    late = replace(LIFT, version=7, before_version=7)
    assert (late,) == outrun(SUBJECT, TOKEN, late, own=(TOKEN,))


def test_what_no_token_has_outrun_stays():
    """And stands for what is as good as nothing beside it, if it lasts as long."""
    above = replace(SUBJECT, version=10, before_version=10)
    assert () == outrun(above)
    assert () == outrun(SUBJECT, above)
    short = replace(above, expires_at=T0 + HOUR / 2)
    assert (SUBJECT,) == outrun(SUBJECT, short, replace(short, version=11))


def test_of_one_subject_the_one_that_lasts_longest_is_enough():
    """It is entered at a version above all of them, whatever theirs."""
    longer = replace(SUBJECT, version=6, before_version=6, expires_at=T0 + 2 * HOUR)
    assert (longer,) == outrun(SUBJECT, longer)
    assert (longer,) == outrun(longer, replace(SUBJECT, version=7, before_version=7))


def test_raised_entry_gets_its_version_anew_and_ends_no_block():
    """So a lift becomes a revocation of the subject; what was lost stays what it was."""
    (entry,) = raised([LIFT])
    assert (RevocationKind.SUBJECT, BOB, None, T0 + HOUR) == (
        entry.kind,
        entry.value,
        entry.before_version,
        entry.expires_at,
    )
    assert [(RevocationKind.LIFT, 5), (RevocationKind.TOKEN, None)] == [
        (entry.kind, entry.before_version) for entry in as_they_were([LIFT, TOKEN])
    ]
