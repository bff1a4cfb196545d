"""Issuing: the order of its parts, what each refusal says and records, and that nothing off the record is signed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from carnet.admission import Admission
from carnet.claims import MAX_SCOPES
from carnet.jwk import KeySet
from carnet.revocations import GENESIS_DIGEST, Revocation, RevocationKind
from carnet.verify import Expectations, parse_unverified, verify_token
from carnet_broker.core.ledger import IssueRecord
from carnet_broker.core.minting import MintingRules
from carnet_broker.core.policy import Policy
from carnet_broker.core.workload import Workload
from carnet_broker.edges.vault.kv_store import KvSigner
from carnet_broker.group_commit import GroupCommit
from carnet_broker.issuance import MAX_BATCH, Issued, Issuer, Refusal, RefusalReason, RefusedError, TokenRequest
from carnet_broker.ports import (
    AuditUnavailableError,
    KeyStoreUnavailableError,
    LogPosition,
    RevocationPage,
    Signer,
)
from carnet_broker.revocation_view import RevocationHolder
from carnet_broker.signing import KeyringHolder, KeyringView
from support import policies
from support.audit import MemoryAudit
from support.keyrings import ISSUER, SECOND, T0, TIMING, running
from support.policies import CRON, ORDERS, OUTSIDER, PAYMENTS

PRIVATE_KEY = ec.derive_private_key(1_000_003, ec.SECP256R1())
OTHER_KEY = ec.derive_private_key(7, ec.SECP256R1())
KEYRING = running()
KEY = KEYRING.active.jwk
THUMBPRINT = "A" * 43
RULES = MintingRules(issuer=ISSUER)
BLOCK = Revocation(7, RevocationKind.BLOCK, str(ORDERS), 7, None)


class SignsWithAnother:
    """Says that it is the key in force, and signs with another."""

    kid = KEY.kid

    def sign(self, signing_input: bytes) -> bytes:
        """Sign wrongly."""
        return KvSigner(self.kid, OTHER_KEY).sign(signing_input)


def revoked(*entries: Revocation) -> RevocationHolder:
    """Return a replica that has read the log of revocations up to version 3, or up to the last of `entries`."""
    holder = RevocationHolder()
    position = LogPosition(1, entries[-1].version if entries else 3, GENESIS_DIGEST)
    holder.take(RevocationPage(position, snapshot=True, entries=entries, read_at=T0), now=T0, mono=0.0)
    return holder


@dataclass
class Desk:
    """An `Issuer` whose every part can be made to fail, and that notes the order in which they are used."""

    rate: float = 1000.0
    burst: int = 1000
    check_every: int = 64
    policy: Policy = field(default_factory=policies.policy)
    signer: Signer | None = field(default_factory=lambda: KvSigner(KEY.kid, PRIVATE_KEY))
    audit: MemoryAudit = field(default_factory=MemoryAudit)
    order: list[str] = field(default_factory=list)
    commits: list[list[IssueRecord]] = field(default_factory=list)
    signed: list[bytes] = field(default_factory=list)
    counted: int = 0
    sign_fails: Exception | None = None
    rules: MintingRules = RULES
    revocations: RevocationHolder = field(default_factory=revoked)
    obstacle: Refusal | None = None

    def __post_init__(self) -> None:
        self.holder = KeyringHolder(island=TIMING.island)
        view = KeyringView(
            keyring=KEYRING, key=KEYRING.active, signer=self.signer, jwks="", confirmed_at=T0, confirmed_mono=0.0
        )
        self.holder.adopt(view)
        self.issuer = Issuer(
            rules=self.rules,
            policy=self._policy,
            keys=self.holder,
            admission=Admission(rate=self.rate, burst=self.burst),
            audit=self.audit,
            commit=self._commit,
            sign=self._sign,
            check_every=self.check_every,
            revocations=self.revocations,
            obstacle=lambda _now, _mono: self.obstacle,
            count_issued=self._count,
        )

    def _policy(self) -> Policy:
        self.order.append("policy")
        return self.policy

    async def _commit(self, records: Sequence[IssueRecord]) -> None:
        self.order.append("audit")
        self.audit.issue(records)
        self.commits.append(list(records))

    async def _sign(self, signer: Signer, inputs: Sequence[bytes]) -> list[bytes]:
        self.order.append("signature")
        self.signed += inputs
        if self.sign_fails is not None:
            raise self.sign_fails
        return [signer.sign(one) for one in inputs]

    def _count(self, tokens: int) -> None:
        self.counted += tokens

    async def ask(
        self, *requests: TokenRequest, by: Workload | None = None, now: datetime = T0, mono: float = 0.0
    ) -> list[Issued | RefusedError]:
        """Ask for tokens as orders, or as somebody else."""
        return await self.issuer.issue(by or workload(), requests, now=now, mono=mono)

    async def refusal_of(self, *requests: TokenRequest, **more: object) -> RefusedError:
        """Ask for what is refused as a whole, or as its only request."""
        try:
            (answer,) = await self.ask(*requests, **more)
        except RefusedError as error:
            return error
        assert isinstance(answer, RefusedError), answer
        return answer


def workload(spiffe_id: object = ORDERS, *, ends_in: timedelta = timedelta(days=1)) -> Workload:
    """A caller. Issuing looks at no other part of the leaf."""
    return Workload(spiffe_id=spiffe_id, thumbprint=THUMBPRINT, leaf=None, not_after=T0 + ends_in)


def wants(audience: str = "payments", *scopes: str, ttl: timedelta | None = None) -> TokenRequest:
    """A request."""
    return TokenRequest(audience, scopes, ttl)


def refusals(desk: Desk) -> list[tuple[str, str, tuple[str, ...], str]]:
    """What is on record of refusals: reason, audience, scopes and the policy."""
    assert {(str(ORDERS), THUMBPRINT)} >= {(one.subject, one.certificate) for one in desk.audit.refused}
    return [(one.reason, one.audience, one.scopes, one.policy) for one in desk.audit.refused]


# -- what is issued ----------------------------------------------------------------------------------------------------


async def test_a_token_is_good_and_is_what_was_recorded():
    """The intent names the token, its key, its end and the rule that allowed it; the token verifies."""
    desk = Desk()
    (issued,) = await desk.ask(wants("payments", "charge"))
    claims = verify_token(
        issued.token,
        keys=KeySet.of([KEY]),
        expectations=Expectations(issuer=ISSUER, audience="payments"),
        peer_thumbprint=THUMBPRINT,
        now=T0,
    )
    record = IssueRecord(
        at=T0,
        token_id=claims.token_id,
        kid=KEY.kid,
        subject=str(ORDERS),
        audience="payments",
        scopes=("charge",),
        expires_at=claims.expires_at,
        certificate=THUMBPRINT,
        policy=desk.policy.version,
        rule=str(desk.policy.grants[0]),
    )
    assert (("charge",), ORDERS, 3) == (claims.scopes, claims.subject, claims.revocation_version)
    assert ([record], []) == (desk.audit.issued, desk.audit.refused)
    assert 1 == desk.counted


async def test_the_answer_says_for_how_long_the_token_is_good_and_when_to_ask_again():
    """From the moment of the call, which is later than the whole second that the token begins with."""
    desk = Desk()
    now = T0 + timedelta(milliseconds=400)
    (issued,) = await desk.ask(wants(ttl=timedelta(seconds=50)), now=now)
    assert timedelta(seconds=49, milliseconds=600) == issued.expires_in
    assert issued.expires_in * 0.6 == issued.refresh_in


async def test_an_unbound_audience_is_recorded_as_unbound():
    """The caller's certificate is on record all the same."""
    desk = Desk()
    (issued,) = await desk.ask(wants("bank"), by=workload(PAYMENTS))
    (record,) = desk.audit.issued
    assert (False, THUMBPRINT, None) == (record.bound, record.certificate, issued.draft.claims.confirmation)


async def test_no_scope_asked_is_all_that_the_grants_give():
    """And a longer life than the shortest of them allows is shortened, which the answer says."""
    desk = Desk()
    (issued,) = await desk.ask(wants(ttl=timedelta(minutes=5)))
    assert (("charge", "report"), True) == (issued.draft.claims.scopes, issued.draft.shortened)
    assert timedelta(minutes=1) == issued.expires_in


async def test_every_token_has_a_name_of_its_own():
    """Also two of one batch."""
    desk = Desk()
    answers = await desk.ask(*[wants()] * MAX_BATCH)
    assert MAX_BATCH == len({answer.draft.claims.token_id for answer in answers})
    assert MAX_BATCH == desk.counted


# -- the order ---------------------------------------------------------------------------------------------------------


async def test_the_intent_is_durable_before_anything_is_signed():
    """Policy, draft, audit, signature: in this order and each once."""
    desk = Desk()
    await desk.ask(wants())
    assert ["policy", "audit", "signature"] == desk.order


async def test_b14_nothing_is_signed_when_the_record_cannot_be_written():
    """No token without a record; the refusal says when to come again."""
    desk = Desk()
    desk.audit.failing = True
    error = await desk.refusal_of(wants())
    assert (RefusalReason.AUDIT_UNAVAILABLE, SECOND) == (error.refusal.reason, error.refusal.retry_after)
    assert isinstance(error.__cause__, AuditUnavailableError)
    assert (["policy", "audit"], [], 0) == (desk.order, desk.signed, desk.counted)


async def test_the_record_is_really_waited_for():
    """A signature is not made while the write is under way."""
    desk = Desk()
    written = asyncio.Event()
    begun = asyncio.Event()

    async def slow(records: Sequence[IssueRecord]) -> None:
        begun.set()
        await written.wait()
        desk.audit.issue(records)

    desk.issuer._commit = slow
    asking = asyncio.create_task(desk.ask(wants()))
    await begun.wait()
    await asyncio.sleep(0.01)
    assert ([], False) == (desk.signed, asking.done())
    written.set()
    assert isinstance((await asking)[0], Issued)


async def test_g11_a_caller_that_goes_away_while_the_record_is_written_gets_no_signature():
    """Its intent may stand on record; no token is made for nobody."""
    desk = Desk()
    begun = asyncio.Event()

    async def hanging(records: Sequence[IssueRecord]) -> None:
        desk.audit.issue(records)
        begun.set()
        await asyncio.Event().wait()

    desk.issuer._commit = hanging
    asking = asyncio.create_task(desk.ask(wants()))
    await begun.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert ([], 1, 0) == (desk.signed, len(desk.audit.issued), desk.counted)


async def test_too_many_calls_are_refused_before_any_work():
    """Nothing is decided, recorded as issued or signed; the refusal is on record, without the caller's words."""
    desk = Desk(rate=1, burst=1)
    await desk.ask(wants())
    desk.order.clear()
    error = await desk.refusal_of(wants("bank"))
    assert (RefusalReason.TOO_MANY_REQUESTS, SECOND) == (error.refusal.reason, error.refusal.retry_after)
    assert ([], [("TOO_MANY_REQUESTS", "", (), "")]) == (desk.order, refusals(desk))
    assert isinstance((await desk.ask(wants(), mono=1.0))[0], Issued)


async def test_k09_with_no_key_to_sign_with_nothing_is_decided():
    """At the end of the island; what is on record says why."""
    desk = Desk()
    passed = TIMING.island + SECOND
    error = await desk.refusal_of(wants(), now=T0 + passed, mono=passed.total_seconds())
    assert (RefusalReason.NO_SIGNING_KEY, 5 * SECOND) == (error.refusal.reason, error.refusal.retry_after)
    assert ([], [], "NO_SIGNING_KEY") == (desk.order, desk.audit.issued, desk.audit.refused[0].reason)
    assert "neither Vault nor the store was reached" in desk.audit.refused[0].detail


async def test_with_no_private_key_nothing_is_issued():
    """A keyring alone does not sign."""
    desk = Desk(signer=None)
    assert RefusalReason.NO_SIGNING_KEY is (await desk.refusal_of(wants())).refusal.reason


# -- signatures --------------------------------------------------------------------------------------------------------


async def test_a_signer_that_fails_leaves_the_intent_on_record_and_no_token():
    """The intent counts as issued: nobody can tell whether Vault signed."""
    desk = Desk(sign_fails=KeyStoreUnavailableError("Vault is sealed"))
    error = await desk.refusal_of(wants())
    assert (RefusalReason.KEY_STORE_UNAVAILABLE, SECOND) == (error.refusal.reason, error.refusal.retry_after)
    assert "Vault" not in error.refusal.message
    assert (1, ["KEY_STORE_UNAVAILABLE"]) == (len(desk.audit.issued), [one.reason for one in desk.audit.refused])
    assert ("Vault is sealed", 0) == (desk.audit.refused[0].detail, desk.counted)


async def test_a_signer_that_signs_with_another_key_is_caught_where_every_signature_is_checked():
    """As with Transit: no such token leaves."""
    desk = Desk(signer=SignsWithAnother(), check_every=1)
    error = await desk.refusal_of(wants())
    assert (RefusalReason.KEY_STORE_UNAVAILABLE, 0) == (error.refusal.reason, desk.counted)


async def test_a_signer_that_signs_with_another_key_is_caught_by_the_sample():
    """One in so many: the one that is looked at, and the others of its batch, do not leave."""
    desk = Desk(signer=SignsWithAnother(), check_every=4)
    good = [isinstance(answer, Issued) for _ in range(3) for answer in await desk.ask(wants())]
    assert [True] * 3 == good
    with pytest.raises(RefusedError, match="KEY_STORE_UNAVAILABLE"):
        await desk.ask(wants(), wants())
    assert 3 == desk.counted


async def test_a_signature_of_another_length_makes_no_token():
    """Whether it is looked at or not."""

    class Short(SignsWithAnother):
        def sign(self, signing_input: bytes) -> bytes:
            return super().sign(signing_input)[:63]

    error = await Desk(signer=Short()).refusal_of(wants())
    assert RefusalReason.KEY_STORE_UNAVAILABLE is error.refusal.reason


async def test_a_missing_signature_is_not_made_up_for_by_another():
    """Tokens and signatures are never paired off by one."""
    desk = Desk()

    async def one_too_few(signer: Signer, inputs: Sequence[bytes]) -> list[bytes]:
        return [signer.sign(one) for one in inputs[1:]]

    desk.issuer._sign = one_too_few
    with pytest.raises(ValueError, match="shorter"):
        await desk.ask(wants(), wants())
    assert 0 == desk.counted


# -- batches -----------------------------------------------------------------------------------------------------------


async def test_a_batch_is_answered_in_its_order_with_one_write_and_one_turn_to_sign():
    """Each request on its own: what is refused does not hold up the others."""
    desk = Desk()
    answers = await desk.ask(
        wants("payments", "charge"),
        wants("bank"),
        wants("mail"),
        wants("payments", "refund"),
        wants("", "charge"),
        wants("payments", "report"),
    )
    told = [
        answer.draft.claims.audience if isinstance(answer, Issued) else str(answer.refusal.reason) for answer in answers
    ]
    assert ["payments", "NOT_GRANTED", "mail", "SCOPE_NOT_GRANTED", "INVALID_REQUEST", "payments"] == told
    assert [("charge",), ("send",), ("report",)] == [one.scopes for one in desk.commits[0]]
    assert (1, ["policy", "audit", "signature"]) == (len(desk.commits), desk.order)
    for answer in answers:
        if isinstance(answer, Issued):
            unverified = parse_unverified(answer.token)
            assert answer.draft.claims.token_id == unverified.unverified_payload["jti"]


async def test_a_batch_in_which_all_is_refused_writes_and_signs_nothing():
    """There is nothing to record as issued."""
    desk = Desk()
    answers = await desk.ask(wants("bank"), wants("nowhere"))
    assert ([RefusalReason.NOT_GRANTED] * 2, ["policy"]) == ([one.refusal.reason for one in answers], desk.order)
    assert 0 == desk.counted


async def test_b09_a_batch_costs_what_its_requests_cost():
    """So a batch is no way around the limit."""
    desk = Desk(rate=1, burst=10)
    await desk.ask(*[wants()] * 8)
    with pytest.raises(RefusedError, match="TOO_MANY_REQUESTS"):
        await desk.ask(*[wants()] * 3)
    await desk.ask(*[wants()] * 2)
    with pytest.raises(RefusedError, match="TOO_MANY_REQUESTS"):
        await desk.ask(wants())


@pytest.mark.parametrize("number", [0, MAX_BATCH + 1])
async def test_a_batch_of_none_or_too_many_is_refused_and_costs_as_well(number):
    """It is on record, and repeating it runs into the limit like anything else."""
    desk = Desk(rate=1, burst=1)
    error = await desk.refusal_of(*[wants()] * number)
    assert (RefusalReason.INVALID_REQUEST, None) == (error.refusal.reason, error.refusal.retry_after)
    error = await desk.refusal_of(*[wants()] * number)
    assert RefusalReason.TOO_MANY_REQUESTS is error.refusal.reason
    assert ["INVALID_REQUEST", "TOO_MANY_REQUESTS"] == [one.reason for one in desk.audit.refused]


async def test_calls_at_the_same_time_share_writes_and_get_their_own_tokens():
    """Through the real group commit: every answer belongs to its caller."""
    desk = Desk()
    with ThreadPoolExecutor(max_workers=1) as executor:
        desk.issuer._commit = GroupCommit(desk.audit.issue, executor, deadline=timedelta(seconds=5))
        answers = await asyncio.gather(*[desk.ask(wants("payments", "charge"), wants("mail")) for _ in range(20)])
    assert 40 == len({answer.draft.claims.token_id for pair in answers for answer in pair})
    assert [["payments", "mail"]] * 20 == [[one.draft.claims.audience for one in pair] for pair in answers]
    assert 40 == len(desk.audit.issued)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "field_"),
    [
        (wants(""), "audience"),
        (wants("pay ments"), "audience"),
        (wants("payments\n"), "audience"),
        (wants("päyments"), "audience"),
        (wants("p" * 256), "audience"),
        (wants("payments", ""), "scopes"),
        (wants("payments", "charge "), "scopes"),
        (wants("payments", 'char"ge'), "scopes"),
        (wants("payments", "charge\\"), "scopes"),
        (wants("payments", "charge\x00"), "scopes"),
        (wants("payments", "s" * 129), "scopes"),
        (wants("payments", "charge", "charge"), "scopes"),
        (wants("payments", *(f"s{n}" for n in range(MAX_SCOPES + 1))), "scopes"),
        (wants(ttl=timedelta(0)), "ttl"),
        (wants(ttl=-SECOND), "ttl"),
        (wants(ttl=timedelta(milliseconds=999)), "ttl"),
        (wants(ttl=SECOND), "ttl"),
        (wants(ttl=29 * SECOND), "ttl"),
    ],
)
async def test_b01_b03_a_request_that_is_not_well_formed_is_refused_by_the_name_of_its_field(request_, field_):
    """Nothing is issued, and the caller is told which field it is, in our words."""
    desk = Desk()
    error = await desk.refusal_of(request_)
    assert (RefusalReason.INVALID_REQUEST, None) == (error.refusal.reason, error.refusal.retry_after)
    assert error.refusal.message.startswith(f"{field_}: ")
    assert ["policy"] == desk.order


async def test_b10_the_words_of_a_request_that_is_not_well_formed_are_not_recorded():
    """The record says that one came, and from whom."""
    desk = Desk()
    await desk.refusal_of(wants("pay\nments", "\x1b[2J"))
    assert [("INVALID_REQUEST", "", (), desk.policy.version)] == refusals(desk)


async def test_b20_an_unknown_audience_and_one_not_granted_read_the_same():
    """So nobody can find out which audiences there are."""
    desk = Desk()
    unknown, denied = await desk.refusal_of(wants("nowhere")), await desk.refusal_of(wants("bank"))
    assert RefusalReason.NOT_GRANTED is unknown.refusal.reason
    assert unknown.refusal == denied.refusal
    stranger = await desk.refusal_of(wants("payments"), by=workload(OUTSIDER))
    assert stranger.refusal == denied.refusal


async def test_b01_one_scope_outside_the_grant_refuses_the_whole_request():
    """Never silently narrowed; the record has what was asked for, the answer does not repeat it."""
    desk = Desk()
    error = await desk.refusal_of(wants("payments", "charge", "refund"))
    assert RefusalReason.SCOPE_NOT_GRANTED is error.refusal.reason
    assert "refund" not in error.refusal.message
    assert [("SCOPE_NOT_GRANTED", "payments", ("charge", "refund"), desk.policy.version)] == refusals(desk)
    assert [] == desk.audit.issued


@pytest.mark.parametrize(("seconds", "issued"), [(29, False), (30, True)])
async def test_a_certificate_that_ends_too_soon_is_refused_by_name(seconds, issued):
    """The caller is told to renew it; the record has its end."""
    desk = Desk()
    caller = workload(ends_in=seconds * SECOND)
    (answer,) = await desk.ask(wants(), by=caller)
    assert issued is isinstance(answer, Issued)
    if not issued:
        assert RefusalReason.CERTIFICATE_ENDING is answer.refusal.reason
        assert "renew it" in answer.refusal.message
        assert "ends at 2026-11-24T12:00:29" in desk.audit.refused[0].detail


async def test_a_grant_that_does_not_fit_into_a_token_is_refused_for_that_request_alone():
    """No verifier would take so large a token; the others of the batch are issued.

    A policy that is read from a file is refused for it, so this one is made by hand.
    """
    scopes = tuple(f"{number:03}{'s' * 125}" for number in range(MAX_SCOPES))
    whole = policies.policy()
    policy = replace(whole, grants=(replace(whole.grants[0], scopes=frozenset(scopes)), *whole.grants[1:]))
    desk = Desk(policy=policy)
    large, fitting = await desk.ask(wants("payments", *scopes), wants("payments", *scopes[:8]))
    assert RefusalReason.INVALID_REQUEST is large.refusal.reason
    assert large.refusal.message.startswith("scopes: ")
    assert "longer than 8192 bytes" in desk.audit.refused[0].detail
    assert scopes[:8] == fitting.draft.claims.scopes


async def test_a_refused_error_says_its_reason_and_never_its_cause():
    """Its text is what the caller may see."""
    desk = Desk(sign_fails=KeyStoreUnavailableError("secret-host.internal"))
    error = await desk.refusal_of(wants())
    assert "KEY_STORE_UNAVAILABLE: the broker cannot sign now" == str(error)


def _failing_audit() -> MemoryAudit:
    audit = MemoryAudit()
    audit.failing = True
    return audit


def _obstacle(reason: RefusalReason) -> Refusal:
    return Refusal(reason, "not now", SECOND)


async def test_a_blocked_workload_gets_nothing_and_others_go_on():
    """Whatever it asks for, the whole call is refused and recorded; nothing is recorded as issued."""
    desk = Desk(revocations=revoked(BLOCK))
    error = await desk.refusal_of(wants("payments"), by=workload(ORDERS))
    assert RefusalReason.BLOCKED is error.refusal.reason
    assert ["BLOCKED"] == [record.reason for record in desk.audit.refused]
    assert [] == desk.audit.issued
    (answer,) = await desk.ask(wants("payments"), by=workload(CRON))
    assert isinstance(answer, Issued)
    assert BLOCK.version == answer.draft.claims.revocation_version


@pytest.mark.parametrize("reason", RefusalReason)
async def test_every_reason_is_reached(reason):
    """A reason that nothing leads to would be a promise to nobody; none is told that is not meant."""
    desk, request, caller = {
        RefusalReason.INVALID_REQUEST: (Desk(), wants(""), workload()),
        RefusalReason.NOT_GRANTED: (Desk(), wants("bank"), workload(CRON)),
        RefusalReason.SCOPE_NOT_GRANTED: (Desk(), wants("payments", "refund"), workload()),
        RefusalReason.CERTIFICATE_ENDING: (Desk(), wants(), workload(ends_in=SECOND)),
        RefusalReason.TOO_MANY_REQUESTS: (Desk(rate=0.001, burst=1), wants(), workload()),
        RefusalReason.NO_SIGNING_KEY: (Desk(signer=None), wants(), workload()),
        RefusalReason.KEY_STORE_UNAVAILABLE: (Desk(sign_fails=KeyStoreUnavailableError("")), wants(), workload()),
        RefusalReason.BLOCKED: (Desk(revocations=revoked(BLOCK)), wants(), workload(ORDERS)),
        RefusalReason.STORE_UNAVAILABLE: (Desk(obstacle=_obstacle(reason)), wants(), workload()),
        RefusalReason.CLOCK_IS_OFF: (Desk(obstacle=_obstacle(reason)), wants(), workload()),
        RefusalReason.AUDIT_UNAVAILABLE: (Desk(audit=_failing_audit()), wants(), workload()),
    }[reason]
    if reason is RefusalReason.TOO_MANY_REQUESTS:
        await desk.ask(request)
    error = await desk.refusal_of(request, by=caller)
    assert reason is error.refusal.reason
    waiting_helps = {
        RefusalReason.TOO_MANY_REQUESTS,
        RefusalReason.NO_SIGNING_KEY,
        RefusalReason.KEY_STORE_UNAVAILABLE,
        RefusalReason.AUDIT_UNAVAILABLE,
        RefusalReason.STORE_UNAVAILABLE,
        RefusalReason.CLOCK_IS_OFF,
    }
    assert (reason in waiting_helps) is (error.refusal.retry_after is not None)
    if reason is not RefusalReason.AUDIT_UNAVAILABLE:
        assert reason == desk.audit.refused[-1].reason
        assert T0 == desk.audit.refused[-1].at
