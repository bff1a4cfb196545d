"""Revoking a token by its holder: whose token it must be, what is told of it, and what goes on the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from carnet.admission import Admission
from carnet.claims import Claims
from carnet.revocations import GENESIS_DIGEST, Revocation, RevocationKind
from carnet.verify import assemble, encode_unsigned
from carnet_broker.core.keyring import Keyring
from carnet_broker.core.ledger import RevocationRecord
from carnet_broker.core.revocation import RevocationRules
from carnet_broker.core.workload import Workload
from carnet_broker.edges.vault.kv_store import KvSigner
from carnet_broker.issuance import RefusalReason, RefusedError
from carnet_broker.ports import (
    Appended,
    AuditUnavailableError,
    LogPosition,
    NewRevocation,
    StoreUnavailableError,
)
from carnet_broker.revoking import Revoker
from carnet_broker.signing import KeyringHolder, KeyringView
from support.audit import MemoryAudit
from support.keyrings import ISSUER, SECOND, T0, TIMING, jwk, running
from support.policies import CRON, ORDERS, OUTSIDER

PRIVATE_KEY = ec.derive_private_key(1_000_003, ec.SECP256R1())
STANDBY_KEY = ec.derive_private_key(1_000_004, ec.SECP256R1())
OTHER_KEY = ec.derive_private_key(7, ec.SECP256R1())
KEYRING = running()
THUMBPRINT = "A" * 43
RULES = RevocationRules(
    longest_life=timedelta(hours=1),
    max_leaf_life=timedelta(days=90),
    max_staleness=timedelta(minutes=5),
    leeway=30 * SECOND,
    skew=5 * SECOND,
)
CLAIMS = Claims(
    issuer=ISSUER,
    subject=ORDERS,
    audience="payments",
    client_id=ORDERS,
    expires_at=T0 + timedelta(minutes=10),
    issued_at=T0,
    not_before=T0,
    token_id="token-0123456789012345",
    scopes=("charge",),
    confirmation=THUMBPRINT,
    revocation_version=3,
)
NOT_ITS_OWN = "this is no token that was issued to the caller, or that speaks for it"


def token(key: ec.EllipticCurvePrivateKey = PRIVATE_KEY, *, kid: str = "", **claims: Any) -> str:  # noqa: ANN401
    """Return a token of CLAIMS, but for `claims`, signed with `key`; and the name of that one, or `kid`, in it."""
    signing_input = encode_unsigned(replace(CLAIMS, **claims), kid or KEYRING.active.kid)
    return assemble(signing_input, KvSigner(KEYRING.active.kid, key).sign(signing_input))


def workload(spiffe_id: Any = ORDERS) -> Workload:  # noqa: ANN401 - a SPIFFE ID
    """Return a caller."""
    return Workload(spiffe_id=spiffe_id, thumbprint=THUMBPRINT, leaf=None, not_after=T0 + timedelta(days=1))


@dataclass
class Desk:
    """A `Revoker` whose every part can be made to fail."""

    burst: int = 100
    keyring: Keyring | None = KEYRING
    store_fails: bool = False
    record_fails: bool = False
    audit: MemoryAudit = field(default_factory=MemoryAudit)
    appended: list[NewRevocation] = field(default_factory=list)
    recorded: list[RevocationRecord] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        keys = KeyringHolder(island=TIMING.island)
        if self.keyring is not None:
            view = KeyringView(
                keyring=self.keyring,
                key=self.keyring.active,
                signer=None,
                jwks="",
                confirmed_at=T0,
                confirmed_mono=0.0,
            )
            keys.adopt(view)
        self.revoker = Revoker(
            issuer=ISSUER,
            keys=keys,
            rules=RULES,
            admission=Admission(rate=1.0, burst=self.burst),
            audit=self.audit,
            append=self._append,
            record=self._record,
            unrecorded=lambda error: self.unrecorded.append(str(error)),
        )

    async def _append(self, entries: Sequence[NewRevocation]) -> Appended:
        if self.store_fails:
            msg = "the shared store cannot be used now"
            raise StoreUnavailableError(msg)
        self.appended += entries
        written = tuple(
            Revocation(version, new.kind, new.value, 0, new.expires_at)
            for version, new in enumerate(entries, 3 + len(self.appended))
        )
        position = LogPosition(1_700_000_000_000, written[-1].version, GENESIS_DIGEST)
        return Appended(entries=written, position=position, at=T0 + SECOND, standing=written)

    async def _record(self, records: Sequence[RevocationRecord]) -> None:
        if self.record_fails:
            msg = "the audit record cannot be written"
            raise AuditUnavailableError(msg)
        self.recorded += records

    async def ask(self, text: str, by: Workload | None = None, *, seconds: float = 1) -> int:
        """Revoke a token so many seconds after T0."""
        return await self.revoker.revoke_token(by or workload(), text, now=T0 + seconds * SECOND, mono=seconds)

    async def refusal_of(self, text: str, by: Workload | None = None) -> RefusedError:
        """Return how a token is not revoked."""
        with pytest.raises(RefusedError) as caught:
            await self.ask(text, by)
        return caught.value


async def test_a_token_is_revoked_by_its_name_until_nobody_takes_it_any_more():
    """The answer is the version; the entry is durable and on the record, with who asked and by which certificate."""
    desk = Desk()
    assert 4 == await desk.ask(token())
    ends = CLAIMS.expires_at + RULES.margin
    (entry,) = desk.appended
    assert (RevocationKind.TOKEN, CLAIMS.token_id, ends) == (entry.kind, entry.value, entry.expires_at)
    assert [
        RevocationRecord(
            at=T0 + SECOND,
            epoch=1_700_000_000_000,
            version=4,
            what="token",
            value=CLAIMS.token_id,
            before_version=0,
            expires_at=ends,
            by=str(ORDERS),
            certificate=THUMBPRINT,
            reason="by its holder",
        )
    ] == desk.recorded
    assert ([], []) == (desk.audit.refused, desk.unrecorded)


@pytest.mark.parametrize("caller", [ORDERS, CRON])
async def test_whom_it_speaks_for_and_whom_it_was_issued_to_may_revoke_it(caller: Any):  # noqa: ANN401
    """`sub` and `client_id`, each of them; any audience."""
    assert 4 == await Desk().ask(token(client_id=CRON, audience="bank"), workload(caller))


async def test_a_token_of_any_key_that_is_published_is_recognised():
    """Another replica may have signed it with the next key already."""
    standby = next(key for key in KEYRING.published if key.kid != KEYRING.active.kid)
    assert 4 == await Desk().ask(token(STANDBY_KEY, kid=standby.kid))


@pytest.mark.parametrize(
    ("text", "caller", "cause"),
    [
        (token(), OUTSIDER, NOT_ITS_OWN),
        (token(issuer="https://tokens.other.example"), ORDERS, NOT_ITS_OWN),
        (token(kid=jwk(9).kid), ORDERS, NOT_ITS_OWN),
        (token(OTHER_KEY), ORDERS, "signature"),
        ("rubbish", ORDERS, ""),
    ],
    ids=["of another", "of another issuer", "of an unknown key", "forged", "rubbish"],
)
async def test_what_is_not_its_own_is_refused_with_the_same_words(text: str, caller: Any, cause: str):  # noqa: ANN401
    """A thief that tries what it found learns nothing; the audit record has why, and the token nowhere."""
    desk = Desk()
    error = await desk.refusal_of(text, workload(caller))
    assert (RefusalReason.NOT_GRANTED, NOT_ITS_OWN, None) == (
        error.refusal.reason,
        error.refusal.message,
        error.refusal.retry_after,
    )
    (refused,) = desk.audit.refused
    assert ("NOT_GRANTED", str(caller), THUMBPRINT) == (refused.reason, refused.subject, refused.certificate)
    assert refused.detail.startswith("RevokeToken: ")
    assert cause in refused.detail
    assert text not in refused.detail
    assert ([], []) == (desk.appended, desk.recorded)


async def test_a_key_that_is_not_published_any_more_and_a_broker_without_keys_recognise_nothing():
    """What they signed is refused everywhere anyway."""
    withdrawn = KEYRING.with_revoked(KEYRING.active.kid, T0, TIMING)
    assert KEYRING.active.kid not in {key.kid for key in withdrawn.published}
    for desk in (Desk(keyring=withdrawn), Desk(keyring=None)):
        assert RefusalReason.NOT_GRANTED is (await desk.refusal_of(token())).refusal.reason
        assert [] == desk.appended


async def test_a_token_that_is_over_everywhere_is_nothing_to_revoke():
    """Version 0, and no entry; a moment earlier it is one."""
    over = (CLAIMS.expires_at + RULES.margin - T0).total_seconds()
    desk = Desk()
    assert 0 == await desk.ask(token(), seconds=over)
    assert ([], [], []) == (desk.appended, desk.recorded, desk.audit.refused)
    assert 4 == await desk.ask(token(), seconds=over - 1)


async def test_who_asks_too_often_is_told_when_to_ask_again():
    """Before the token is looked at; others are not held up."""
    desk = Desk(burst=1)
    await desk.ask(token())
    error = await desk.refusal_of(token())
    assert RefusalReason.TOO_MANY_REQUESTS is error.refusal.reason
    assert error.refusal.retry_after is not None
    assert timedelta() < error.refusal.retry_after <= SECOND
    assert ["TOO_MANY_REQUESTS"] == [record.reason for record in desk.audit.refused]
    assert 5 == await desk.ask(token(subject=CRON), workload(CRON))


async def test_a_store_that_is_away_is_said_and_nothing_is_claimed():
    """It may have been written all the same, so the caller is told to ask again."""
    desk = Desk(store_fails=True)
    error = await desk.refusal_of(token())
    assert (RefusalReason.STORE_UNAVAILABLE, SECOND) == (error.refusal.reason, error.refusal.retry_after)
    assert "ask again" in error.refusal.message
    (refused,) = desk.audit.refused
    assert "RevokeToken: the shared store cannot be used now" == refused.detail
    assert [] == desk.recorded


async def test_a_revocation_that_cannot_be_recorded_holds_nevertheless():
    """Whoever revokes cannot wait for a disk; somebody hears of it."""
    desk = Desk(record_fails=True)
    assert 4 == await desk.ask(token())
    assert (1, ["the audit record cannot be written"]) == (len(desk.appended), desk.unrecorded)
