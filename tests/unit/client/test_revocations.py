"""Revocations: what each kind refuses, what outdoes what, the chain of digests, and what a certificate is called."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from carnet.certificate_names import certificate_names, parse_certificate_name
from carnet.claims import Claims
from carnet.errors import InvalidRevocationError
from carnet.revocations import (
    GENESIS_DIGEST,
    Revocation,
    RevocationKind,
    RevocationSet,
    check_entry,
    lagging_time,
    next_digest,
)
from carnet.spiffe import SpiffeID
from carnet.testing.ca import CertificateAuthority

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
ORDERS = "spiffe://prod.example/ns/shop/sa/orders"
CRON = "spiffe://prod.example/ns/shop/sa/cron"
JTI = "abcdefghijklmnop"
THUMBPRINT = "A" * 43

CLAIMS = Claims(
    issuer="https://tokens.prod.example",
    subject=SpiffeID.parse(ORDERS),
    audience="payments",
    client_id=SpiffeID.parse(ORDERS),
    expires_at=NOW + timedelta(minutes=5),
    issued_at=NOW,
    not_before=NOW,
    token_id=JTI,
    scopes=("charge",),
    confirmation=THUMBPRINT,
    revocation_version=7,
)


def entry(kind: str, value: str, *, version: int = 1, before: int | None = None, ends: datetime | None = LATER):
    """Return an entry; `before` is the version itself where the kind looks at versions."""
    by_version = kind in {"subject", "block", "lift"}
    return Revocation(
        version,
        RevocationKind(kind),
        value,
        (before or version) if by_version else 0,
        None if kind == "block" else ends,
    )


class TestRefusal:
    """Which tokens a set refuses; each refusal has the twin that is let through."""

    @pytest.mark.parametrize(
        ("revocation", "is_refused"),
        [
            (entry("token", JTI), True),
            (entry("token", JTI[:-1] + "x"), False),
            (entry("root", JTI), True),
            (entry("root", JTI[:-1] + "x"), False),
            (entry("subject", ORDERS, version=8), True),
            (entry("subject", ORDERS, version=7), False),
            (entry("subject", ORDERS, version=20, before=7), False),
            (entry("subject", ORDERS + "2", version=8), False),
            (entry("lift", ORDERS, version=8), True),
            (entry("lift", ORDERS, version=7), False),
            (entry("block", ORDERS, version=3), True),
            (entry("block", CRON, version=9), False),
            (entry("certificate", f"sha256:{THUMBPRINT}"), True),
            (entry("certificate", f"sha256:{THUMBPRINT[:-1]}E"), False),
            (entry("certificate", f"spki-sha256:{THUMBPRINT}"), False),
        ],
        ids=lambda value: (
            value if isinstance(value, bool) else f"{value.kind}-{value.value[-8:]}-{value.before_version}"
        ),
    )
    def test_a_kind_refuses_what_it_names_and_nothing_else(self, revocation: Revocation, is_refused: bool):
        """T26, B10: by jti, by the version that the issuer had, by certificate."""
        check_entry(revocation)
        expected = revocation if is_refused else None
        assert expected == RevocationSet([revocation]).refusal(CLAIMS)

    def test_a_token_of_another_client_for_a_revoked_one_is_refused(self):
        """The client is looked at like the subject: a token that was asked for by a stolen workload is of it."""
        revoked = entry("subject", CRON, version=8)
        assert revoked == RevocationSet([revoked]).refusal(replace(CLAIMS, client_id=SpiffeID.parse(CRON)))

    def test_an_unbound_token_is_not_refused_for_a_certificate(self):
        """There is nothing to compare, and an empty comparison must not match."""
        assert (
            RevocationSet([entry("certificate", f"sha256:{THUMBPRINT}")]).refusal(replace(CLAIMS, confirmation=None))
            is None
        )

    @pytest.mark.parametrize("form", ["sha256:", "spki-sha256:", "serial:"])
    def test_the_certificate_that_the_caller_shows_is_refused_by_each_of_its_names(self, form: str):
        """T16: also where the token is bound to none."""
        authority = CertificateAuthority.create("prod.example")
        leaf = authority.issue(ORDERS).leaf
        other = authority.issue(ORDERS).leaf
        name = next(name for name in certificate_names(leaf) if name.startswith(form))
        revocations = RevocationSet([entry("certificate", name)])
        claims = replace(CLAIMS, confirmation=None)
        assert revocations.refusal(claims, peer_names=certificate_names(leaf)) is not None
        assert revocations.refusal(claims, peer_names=certificate_names(other)) is None
        assert parse_certificate_name(name) == name

    def test_an_empty_set_refuses_nothing(self):
        """The twin of all of the above."""
        assert RevocationSet().refusal(CLAIMS) is None
        assert RevocationSet().blocks(ORDERS) is None


class TestUnion:
    """What becomes of entries that name the same."""

    def test_a_lift_ends_the_blocks_before_it_in_any_order(self):
        """An old block that comes back with somebody's own entries does not outlive its lift."""
        blocked, lifted = entry("block", ORDERS, version=3), entry("lift", ORDERS, version=5)
        for order in ([blocked, lifted], [lifted, blocked]):
            revocations = RevocationSet(order)
            assert revocations.blocks(ORDERS) is None
            assert revocations.refusal(replace(CLAIMS, revocation_version=5)) is None
            assert revocations.refusal(replace(CLAIMS, revocation_version=4)) == lifted

    def test_a_block_after_a_lift_holds(self):
        """Blocked again: whatever order they come in."""
        entries = [
            entry("block", ORDERS, version=3),
            entry("lift", ORDERS, version=5),
            entry("block", ORDERS, version=6),
        ]
        for _ in range(10):
            random.shuffle(entries)
            assert RevocationSet(entries).blocks(ORDERS) == entry("block", ORDERS, version=6)

    def test_a_block_does_not_make_a_subject_forgotten(self):
        """When the block is lifted, the tokens of before stay refused."""
        entries = [entry("subject", ORDERS, version=3), entry("block", ORDERS, version=4)]
        assert len(RevocationSet(entries)) == 2

    def test_a_block_that_is_lifted_again_and_again_leaves_the_last_lift(self):
        """The set does not grow with them."""
        entries = [entry("block" if version % 2 else "lift", ORDERS, version=version) for version in range(1, 21)]
        random.shuffle(entries)
        assert RevocationSet(entries).entries() == (entry("lift", ORDERS, version=20),)

    def test_of_two_that_refuse_the_same_the_longer_one_stays(self):
        """Rule 6, for each kind."""
        for kind, value in (("token", JTI), ("root", JTI), ("certificate", f"sha256:{THUMBPRINT}")):
            short, long = entry(kind, value, version=2), entry(kind, value, ends=LATER + timedelta(hours=1))
            for order in ([short, long], [long, short]):
                assert RevocationSet(order).entries() == (long,)

    def test_a_later_subject_outdoes_an_earlier_one_unless_it_ends_first(self):
        """The one with the higher version refuses more; the one that ends later, longer. Neither is lost."""
        first, second = entry("subject", ORDERS, version=3), entry("subject", ORDERS, version=5)
        assert RevocationSet([first, second]).entries() == (second,)
        brief = replace(second, expires_at=NOW)
        assert RevocationSet([first, brief]).entries() == (first, brief)

    def test_a_lift_stays_beside_a_later_subject(self):
        """Or a block of before it could come back."""
        lifted, revoked = entry("lift", ORDERS, version=5), entry("subject", ORDERS, version=9)
        assert RevocationSet([revoked, lifted]).entries() == (lifted, revoked)
        assert RevocationSet([revoked, lifted, entry("block", ORDERS, version=4)]).blocks(ORDERS) is None

    def test_a_root_outdoes_a_token_and_not_the_other_way(self):
        """A root also refuses what was derived."""
        token, root = entry("token", JTI, version=1), entry("root", JTI, version=2)
        assert RevocationSet([token, root]).entries() == (root,)
        assert RevocationSet([replace(root, expires_at=NOW), token]).entries() == (token, replace(root, expires_at=NOW))

    def test_an_entry_that_comes_twice_changes_nothing(self):
        """A snapshot and a delta may overlap."""
        entries = [entry("token", JTI), entry("subject", ORDERS, version=2), entry("block", CRON, version=3)]
        assert RevocationSet([*entries, *entries]).entries() == tuple(entries)

    def test_entries_are_told_by_version(self):
        """As they are sent."""
        entries = [entry("token", f"{JTI}{number}", version=number) for number in range(1, 9)]
        assert RevocationSet(reversed(entries)).entries() == tuple(entries)


class TestExpiry:
    """Rule 5."""

    def test_an_entry_goes_at_its_end_and_not_a_second_earlier(self):
        """A block does not go at all."""
        revocations = RevocationSet(
            [entry("token", JTI), entry("block", CRON, version=2), entry("subject", ORDERS, version=3)]
        )
        assert revocations.expire(LATER - timedelta(seconds=1)) == 0
        assert revocations.expire(LATER) == 2
        assert revocations.entries() == (entry("block", CRON, version=2),)

    def test_of_several_of_one_name_those_that_have_ended_go(self):
        """The others stay."""
        first = entry("subject", ORDERS, version=3)
        brief = replace(entry("subject", ORDERS, version=5), expires_at=NOW)
        revocations = RevocationSet([first, brief])
        assert revocations.expire(NOW) == 1
        assert revocations.entries() == (first,)

    @pytest.mark.parametrize(
        ("wall", "expected"),
        [
            (timedelta(hours=9), timedelta(minutes=1)),
            (timedelta(minutes=1), timedelta(minutes=1)),
            (-timedelta(hours=9), -timedelta(hours=9)),
        ],
        ids=["ahead", "right", "behind"],
    )
    def test_a_clock_that_jumps_ahead_is_not_believed(self, wall: timedelta, expected: timedelta):
        """CVE-2021-29653 elsewhere: what was cleaned up too early was trusted again."""
        assert lagging_time(started=NOW, elapsed=timedelta(minutes=1), wall=NOW + wall) == NOW + expected


class TestDigest:
    """The chain."""

    def test_each_part_of_an_entry_is_in_the_digest(self):
        """Two sides that differ in anything differ in the digest."""
        one = entry("subject", ORDERS, version=5)
        changed = [
            replace(one, version=6),
            replace(one, kind=RevocationKind.LIFT),
            replace(one, value=CRON),
            replace(one, before_version=4),
            replace(one, expires_at=LATER + timedelta(seconds=1)),
            entry("block", ORDERS, version=5),
        ]
        digests = {next_digest(GENESIS_DIGEST, each) for each in (one, *changed)} | {next_digest(b"\1" * 32, one)}
        assert len(digests) == len(changed) + 2

    def test_the_digest_is_this_one(self):
        """A value that other releases have to come to as well."""
        told = next_digest(next_digest(GENESIS_DIGEST, entry("token", JTI)), entry("block", ORDERS, version=2))
        assert told.hex() == "e7fbcebdd9b9eeb5969a4fd4ff849ead0cdd962bebf77db4178194c7fa2b3cae"


class TestForm:
    """What an entry can say."""

    @pytest.mark.parametrize(
        "wrong",
        [
            entry("token", "short"),
            entry("token", ORDERS),
            entry("root", JTI + "\n"),
            entry("subject", JTI),
            entry("subject", "spiffe://PROD.example/a"),
            entry("block", "spiffe://prod.example/*"),
            entry("certificate", JTI),
            entry("certificate", f"md5:{THUMBPRINT}"),
            entry("certificate", f"sha256:{THUMBPRINT}="),
            entry("certificate", f"serial:0F:{THUMBPRINT}"),
            entry("certificate", f"serial:0f:{THUMBPRINT}"),
            entry("certificate", "serial:f"),
            entry("token", JTI, version=0),
            entry("token", JTI, version=2**53),
            replace(entry("token", JTI), before_version=1),
            replace(entry("subject", ORDERS), before_version=0),
            replace(entry("subject", ORDERS), before_version=2**53),
            replace(entry("token", JTI), expires_at=None),
            replace(entry("subject", ORDERS), expires_at=None),
            replace(entry("token", JTI), expires_at=LATER + timedelta(microseconds=1)),
            replace(entry("token", JTI), expires_at=datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1)))),
        ],
        ids=str,
    )
    def test_what_a_kind_cannot_say_is_refused(self, wrong: Revocation):
        """Nothing that means nothing is stored or loaded."""
        with pytest.raises(InvalidRevocationError, match="revocation"):
            check_entry(wrong)

    @pytest.mark.parametrize(
        "right",
        [
            entry("certificate", f"serial:0:{THUMBPRINT}"),
            entry("certificate", f"serial:f0:{THUMBPRINT}"),
            entry("certificate", f"spki-sha256:{THUMBPRINT}"),
            entry("block", ORDERS),
            replace(entry("block", ORDERS), expires_at=LATER),
            entry("token", JTI, version=2**53 - 1),
        ],
        ids=str,
    )
    def test_what_it_can_is_not(self, right: Revocation):
        """The twins."""
        check_entry(right)

    def test_a_set_shows_its_size_alone(self):
        """Not what it holds: who was cut off is for the ledger."""
        assert repr(RevocationSet([entry("token", JTI)])) == "RevocationSet(1 entries)"


def test_a_set_says_whether_it_names_certificates():
    """Only then the names of the caller's certificate are worth their time."""
    assert not RevocationSet([entry("token", JTI)]).names_certificates
    assert RevocationSet([entry("certificate", f"sha256:{THUMBPRINT}")]).names_certificates
