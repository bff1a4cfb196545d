"""The set of revocations against the plain reading of its rules, over entries in any order."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from carnet.claims import Claims
from carnet.revocations import Revocation, RevocationKind, RevocationSet, check_entry
from carnet.spiffe import SpiffeID

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
SUBJECTS = [f"spiffe://prod.example/sa/{name}" for name in ("a", "b")]
TOKENS = ["token-0000000001", "token-0000000002"]
THUMBPRINTS = ["A" * 43, "B" * 42 + "A"]


@st.composite
def logs(draw: st.DrawFn) -> list[Revocation]:
    """A log of up to 12 entries about few things, with ends that run against the versions."""
    entries = []
    for version in range(1, draw(st.integers(0, 12)) + 1):
        kind = draw(st.sampled_from(RevocationKind))
        ends: datetime | None = NOW + timedelta(seconds=draw(st.integers(1, 4)))
        before = 0
        if kind in {RevocationKind.TOKEN, RevocationKind.ROOT}:
            value = draw(st.sampled_from(TOKENS))
        elif kind is RevocationKind.CERTIFICATE:
            value = f"sha256:{draw(st.sampled_from(THUMBPRINTS))}"
        else:
            value, before = draw(st.sampled_from(SUBJECTS)), draw(st.integers(1, version))
            if kind is RevocationKind.BLOCK and draw(st.booleans()):
                ends = None
        entries.append(Revocation(version, kind, value, before, ends))
        check_entry(entries[-1])
    return entries


@st.composite
def tokens(draw: st.DrawFn) -> Claims:
    """A token about the same things."""
    return Claims(
        issuer="https://tokens.prod.example",
        subject=SpiffeID.parse(draw(st.sampled_from(SUBJECTS))),
        audience="payments",
        client_id=SpiffeID.parse(draw(st.sampled_from(SUBJECTS))),
        expires_at=NOW + timedelta(minutes=5),
        issued_at=NOW,
        not_before=NOW,
        token_id=draw(st.sampled_from(TOKENS)),
        scopes=("charge",),
        confirmation=draw(st.sampled_from([None, *THUMBPRINTS])),
        revocation_version=draw(st.integers(0, 12)),
    )


def is_refused(log: Sequence[Revocation], claims: Claims, now: datetime) -> bool:
    """Say what the rules say, entry by entry, with nothing left out or put together."""
    for entry in log:
        if entry.expires_at is not None and entry.expires_at <= now:
            continue
        names = {str(claims.subject), str(claims.client_id)}
        match entry.kind:
            case RevocationKind.TOKEN | RevocationKind.ROOT:
                hit = entry.value == claims.token_id
            case RevocationKind.CERTIFICATE:
                hit = entry.value == f"sha256:{claims.confirmation}"
            case RevocationKind.BLOCK:
                hit = entry.value in names and not any(
                    later.kind is RevocationKind.LIFT and later.value == entry.value and later.version > entry.version
                    for later in log
                )
            case _:
                hit = entry.value in names and claims.revocation_version < entry.before_version
        if hit:
            return True
    return False


@given(log=logs(), claims=tokens(), data=st.data())
def test_a_set_refuses_what_the_rules_say_in_whatever_order_it_learns(
    log: list[Revocation], claims: Claims, data: st.DataObject
):
    """Snapshots, deltas and what a verifier knew before an epoch come together in any order, some of it twice."""
    order = data.draw(st.permutations(log + log[: len(log) // 2]))
    revocations = RevocationSet(order)
    assert is_refused(log, claims, NOW) == (revocations.refusal(claims) is not None)
    assert set(revocations.entries()) <= set(log)


@given(log=logs(), claims=tokens(), data=st.data(), seconds=st.integers(0, 5))
def test_what_has_ended_is_dropped_and_nothing_else(
    log: list[Revocation], claims: Claims, data: st.DataObject, seconds: int
):
    """After any time the set refuses what the entries that are left refuse. A lift that ended has done its work."""
    now = NOW + timedelta(seconds=seconds)
    revocations = RevocationSet(data.draw(st.permutations(log)))
    revocations.expire(now)
    assert is_refused(log, claims, now) == (revocations.refusal(claims) is not None)
