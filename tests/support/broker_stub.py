"""A small broker for tests of the SDK: real gRPC over real mutual TLS, real signatures; policy and Vault left out.

It grants every audience and scope, and can be told to fail in every way in which a broker fails::

    with BrokerStub.start(ca) as broker:
        broker.token_faults.hang()
        ...
        broker.token_faults.clear()

It has a log of revocations, pushes what changes to those who watch, and can be told to lie::

        broker.revoke(RevocationKind.TOKEN, token_id)
        broker.tamper = lambda response: ...
"""

from __future__ import annotations

import math
import queue
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, NoReturn, Self, cast

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from carnet.claims import Claims, certificate_thumbprint
from carnet.jwk import KeySet, PublicJWK
from carnet.revocations import GENESIS_DIGEST, Position, Revocation, RevocationKind, next_digest
from carnet.spiffe import SpiffeID, server_dns_name, spiffe_id_of_certificate
from carnet.testing.ca import CertificateAuthority
from carnet.v1 import token_pb2, token_pb2_grpc, trust_pb2, trust_pb2_grpc
from carnet.verify import assemble, encode_unsigned, raw_signature

__all__ = ["BROKER_ID", "ISSUER", "BrokerStub", "Faults", "IssuedCall", "wire_entry"]

BROKER_ID = "spiffe://prod.example/ns/carnet/sa/broker"
ISSUER = "https://tokens.prod.example"

_ES256 = ec.ECDSA(hashes.SHA256())
_KINDS = {kind: getattr(trust_pb2, f"REVOCATION_KIND_{kind.name}") for kind in RevocationKind}
_LONGEST_HANG = 30.0
"""So that a test that fails does not leave a thread behind for ever."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    code: grpc.StatusCode
    reason: str
    message: str
    retry_after: timedelta | None


class Faults:
    """How one service fails just now. Not at all at first; each method replaces the fault before it."""

    def __init__(self) -> None:
        self._refusal: _Refusal | None = None
        self._delay = 0.0
        self._go_on = threading.Event()
        self._go_on.set()

    def clear(self) -> None:
        """Answer as a broker should; calls that hang go on."""
        self._refusal, self._delay = None, 0.0
        self._go_on.set()

    def deny(self, reason: str = "NOT_GRANTED", *, code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED) -> None:
        """Refuse every call."""
        self.clear()
        self._refusal = _Refusal(code, reason, "the policy does not allow this", None)

    def unavailable(self, reason: str = "NO_KEYRING", *, retry_after: timedelta | None = None) -> None:
        """Answer that the broker cannot answer now."""
        self.clear()
        self._refusal = _Refusal(grpc.StatusCode.UNAVAILABLE, reason, "the broker cannot answer now", retry_after)

    def slow(self, seconds: float) -> None:
        """Answer every call after `seconds`."""
        self.clear()
        self._delay = seconds

    def hang(self) -> None:
        """Take calls and never answer, like a process that was stopped."""
        self.clear()
        self._go_on.clear()

    def apply(self, context: grpc.ServicerContext) -> None:
        """Fail as told, inside a handler."""
        if self._delay:
            threading.Event().wait(self._delay)
        self._go_on.wait(_LONGEST_HANG)
        if self._refusal is not None:
            _abort(context, self._refusal)


@dataclass(frozen=True, slots=True)
class IssuedCall:
    """One request for a token, as it came in."""

    audience: str
    scopes: tuple[str, ...]
    ttl: timedelta | None
    workload: SpiffeID
    thumbprint: str


@dataclass
class BrokerStub:
    """The running broker. `life` and `refresh_in` are what it answers; None for `refresh_in` is 60 % of the life."""

    ca: CertificateAuthority
    issuer: str = ISSUER
    life: timedelta = timedelta(minutes=5)
    refresh_in: timedelta | None = None
    scopes: tuple[str, ...] = ("charge",)
    max_age: timedelta = timedelta(minutes=5)
    age: timedelta = timedelta()
    bind: bool = True
    workers: int = 16
    token_faults: Faults = field(default_factory=Faults)
    trust_faults: Faults = field(default_factory=Faults)
    issue_calls: list[IssuedCall] = field(default_factory=list)
    key_set_calls: list[str] = field(default_factory=list)
    """The missing key id of each call; empty where none was named."""
    key_set_text: str | None = None
    """What GetKeySet answers instead of the keys, None for the keys."""
    generation: int = 1
    port: int = 0
    signing_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    watch_faults: Faults = field(default_factory=Faults)
    revocation_faults: Faults = field(default_factory=Faults)
    """Of GetRevocations."""
    heartbeat: timedelta = timedelta(seconds=1)
    epoch: int = 1_700_000_000_000
    log: list[Revocation] = field(default_factory=list)
    part_entries: int = 1000
    old: bool = False
    """A broker of the version before: it knows neither Watch nor GetRevocations."""
    tamper: Callable[[trust_pb2.WatchResponse], trust_pb2.WatchResponse | None] | None = None
    """Changes each response on its way, or keeps it back."""
    hellos: list[trust_pb2.WatchHello] = field(default_factory=list)
    answers: list[trust_pb2.WatchAnswer] = field(default_factory=list)
    goodbyes: int = 0
    watching: int = 0
    revocation_calls: int = 0

    def __post_init__(self) -> None:
        self._published = [PublicJWK.of(self.signing_key.public_key())]
        self._lock = threading.Lock()
        self._server: grpc.Server | None = None
        self.changed = threading.Condition()
        self.is_up = False

    @classmethod
    def start(cls, ca: CertificateAuthority, **settings: Any) -> Self:  # noqa: ANN401 - the fields of the class
        """Return a broker that listens on a free port of the loopback."""
        broker = cls(ca, **settings)
        broker.up()
        return broker

    @property
    def target(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def server_name(self) -> str:
        """The DNS name in its certificate."""
        return server_dns_name(SpiffeID.parse(BROKER_ID))

    @property
    def keys(self) -> KeySet:
        """The keys that it publishes."""
        return KeySet.of(self._published)

    def up(self) -> None:
        """Listen, on the port of the time before if there was one."""
        server = grpc.server(futures.ThreadPoolExecutor(self.workers), options=[("grpc.so_reuseport", 0)])
        token_pb2_grpc.add_TokenServiceServicer_to_server(_TokenService(self), server)
        service = trust_pb2_grpc.TrustServiceServicer if self.old else _WatchedTrustService
        trust_pb2_grpc.add_TrustServiceServicer_to_server(type("_Trust", (_TrustService, service), {})(self), server)
        self.is_up = True
        own = self.ca.issue_server(BROKER_ID)
        credentials = grpc.ssl_server_credentials(
            [(own.private_key_pem, own.certificate_pem)],
            root_certificates=self.ca.root_pem,
            require_client_auth=True,
        )
        self.port = server.add_secure_port(self.target, credentials)
        server.start()
        self._server = server

    def down(self) -> None:
        """Stop listening; open connections are cut."""
        for faults in (self.token_faults, self.trust_faults, self.watch_faults, self.revocation_faults):
            faults.clear()
        with self.changed:
            self.is_up = False
            self.changed.notify_all()
        if self._server is not None:
            self._server.stop(grace=None).wait(5)
            self._server = None

    def rotate(self, *, keep_old: bool = True) -> PublicJWK:
        """Sign with a new key from now on, published together with the old ones or instead of them."""
        self.signing_key = ec.generate_private_key(ec.SECP256R1())
        jwk = PublicJWK.of(self.signing_key.public_key())
        self._published = [jwk, *(self._published if keep_old else ())]
        with self.changed:
            self.generation += 1
            self.changed.notify_all()
        return jwk

    @property
    def position(self) -> Position:
        """How far it is."""
        digest = GENESIS_DIGEST
        for entry in self.log:
            digest = next_digest(digest, entry)
        return Position(self.epoch, self.generation, self.log[-1].version if self.log else 0, digest)

    def revoke(self, kind: RevocationKind, value: str, *, lasts: timedelta = timedelta(hours=1)) -> Revocation:
        """Write one entry into the log, and push it."""
        with self.changed:
            version = self.log[-1].version + 1 if self.log else 1
            by_version = kind in {RevocationKind.SUBJECT, RevocationKind.BLOCK, RevocationKind.LIFT}
            ends = None if kind is RevocationKind.BLOCK else datetime.now(UTC).replace(microsecond=0) + lasts
            entry = Revocation(version, kind, value, version if by_version else 0, ends)
            self.log.append(entry)
            self.changed.notify_all()
        return entry

    def restore(self, epoch: int, log: Iterable[Revocation] = ()) -> None:
        """Be in another epoch, with other revocations, as after a restore of the store."""
        with self.changed:
            self.epoch, self.log = epoch, list(log)
            self.changed.notify_all()

    def beat(self) -> None:
        """Send a heartbeat now, or what has changed."""
        with self.changed:
            self.changed.notify_all()

    def changes_since(self, since: Position | None) -> list[trust_pb2.RevocationChange]:
        """Return what leads from `since` to here, in parts; none where that is where it is."""
        to = self.position
        if since is not None and (since.epoch, since.revocation_version) == (to.epoch, to.revocation_version):
            return []
        start = since.revocation_version if since is not None and since.epoch == to.epoch else 0
        entries = [entry for entry in self.log if entry.version > start]
        size = self.part_entries
        parts = [entries[at : at + size] for at in range(0, len(entries), size)] or [[]]
        return [
            trust_pb2.RevocationChange(
                from_version=start,
                to_version=to.revocation_version,
                to_digest=to.revocation_digest,
                snapshot=not start,
                more=number < len(parts),
                revocations=map(wire_entry, part),
            )
            for number, part in enumerate(parts, 1)
        ]

    def mint(
        self,
        *,
        audience: str = "payments",
        subject: SpiffeID | str = "spiffe://prod.example/ns/shop/sa/orders",
        scopes: Iterable[str] = ("charge",),
        thumbprint: str | None = None,
        now: datetime | None = None,
        life: timedelta | None = None,
        revocation_version: int = 0,
    ) -> str:
        """Return a token with these claims, signed with the current key."""
        now = now or datetime.now(UTC)
        workload = SpiffeID.parse(subject) if isinstance(subject, str) else subject
        issued_at = now.replace(microsecond=0)
        claims = Claims(
            issuer=self.issuer,
            subject=workload,
            audience=audience,
            client_id=workload,
            # Whole seconds (RFC 7519 allows more, our profile does not), and never shorter than the life.
            expires_at=datetime.fromtimestamp(math.ceil((now + (life or self.life)).timestamp()), UTC),
            issued_at=issued_at,
            not_before=issued_at,
            token_id=secrets.token_urlsafe(16),
            scopes=tuple(sorted(scopes)),
            confirmation=thumbprint,
            revocation_version=revocation_version,
        )
        signing_input = encode_unsigned(claims, PublicJWK.of(self.signing_key.public_key()).kid)
        return assemble(signing_input, raw_signature(self.signing_key.sign(signing_input, _ES256)))

    def issue(
        self, request: token_pb2.IssueTokenRequest, context: grpc.ServicerContext
    ) -> token_pb2.IssueTokenResponse:
        """Answer one request, by the certificate of the caller."""
        chain = cast("list[bytes]", context.auth_context()["x509_pem_cert"])
        leaf = x509.load_pem_x509_certificate(chain[0])
        workload, thumbprint = spiffe_id_of_certificate(leaf), certificate_thumbprint(leaf)
        ttl = request.ttl.ToTimedelta() if request.HasField("ttl") else None
        with self._lock:
            self.issue_calls.append(IssuedCall(request.audience, tuple(request.scopes), ttl, workload, thumbprint))
        self.token_faults.apply(context)
        life = self.life if ttl is None else min(ttl, self.life)
        refresh_in = 0.6 * life if self.refresh_in is None else self.refresh_in
        scopes = sorted(request.scopes or self.scopes)
        token = self.mint(
            audience=request.audience,
            subject=workload,
            scopes=scopes,
            thumbprint=thumbprint if self.bind else None,
            life=life,
        )
        return token_pb2.IssueTokenResponse(
            token=token,
            expires_in=_duration(life),
            refresh_in=_duration(refresh_in),
            scopes=scopes,
            ttl_shortened=ttl is not None and life < ttl,
        )

    def key_set(
        self, request: trust_pb2.GetKeySetRequest, context: grpc.ServicerContext
    ) -> trust_pb2.GetKeySetResponse:
        """Answer with the published keys."""
        with self._lock:
            self.key_set_calls.append(request.missing_key_id)
        self.trust_faults.apply(context)
        return trust_pb2.GetKeySetResponse(
            issuer=self.issuer,
            generation=self.generation,
            jwks=self.keys.to_json() if self.key_set_text is None else self.key_set_text,
            max_age=_duration(self.max_age),
            age=_duration(self.age),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.down()


class _TokenService(token_pb2_grpc.TokenServiceServicer):
    def __init__(self, broker: BrokerStub) -> None:
        self._broker = broker

    def IssueToken(  # noqa: N802 - the name of the RPC
        self, request: token_pb2.IssueTokenRequest, context: grpc.ServicerContext
    ) -> token_pb2.IssueTokenResponse:
        return self._broker.issue(request, context)

    def IssueTokens(  # noqa: N802 - the name of the RPC
        self, request: token_pb2.IssueTokensRequest, context: grpc.ServicerContext
    ) -> token_pb2.IssueTokensResponse:
        issued = [self._broker.issue(one, context) for one in request.requests]
        return token_pb2.IssueTokensResponse(
            results=[token_pb2.IssueTokenResult(issued=response) for response in issued]
        )

    def RevokeToken(  # noqa: N802 - the name of the RPC
        self, request: token_pb2.RevokeTokenRequest, context: grpc.ServicerContext
    ) -> token_pb2.RevokeTokenResponse:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "revoke with BrokerStub.revoke")


class _TrustService(trust_pb2_grpc.TrustServiceServicer):
    def __init__(self, broker: BrokerStub) -> None:
        self._broker = broker

    def GetKeySet(  # noqa: N802 - the name of the RPC
        self, request: trust_pb2.GetKeySetRequest, context: grpc.ServicerContext
    ) -> trust_pb2.GetKeySetResponse:
        return self._broker.key_set(request, context)


class _WatchedTrustService(trust_pb2_grpc.TrustServiceServicer):
    _broker: BrokerStub

    def GetRevocations(  # noqa: N802 - the name of the RPC
        self, request: trust_pb2.GetRevocationsRequest, context: grpc.ServicerContext
    ) -> Iterator[trust_pb2.GetRevocationsResponse]:
        broker = self._broker
        broker.revocation_calls += 1
        broker.revocation_faults.apply(context)
        since = _read(getattr(request, "from")) if request.HasField("from") else None
        position, age = _wire(broker.position), _duration(broker.age)
        changes: Sequence[trust_pb2.RevocationChange | None] = broker.changes_since(since) or [None]
        for change in changes:
            yield trust_pb2.GetRevocationsResponse(position=position, age=age, change=change)

    def Watch(  # noqa: N802 - the name of the RPC
        self, requests: Iterator[trust_pb2.WatchRequest], context: grpc.ServicerContext
    ) -> Iterator[trust_pb2.WatchResponse]:
        broker = self._broker
        hello = next(requests).hello
        broker.hellos.append(hello)
        broker.watch_faults.apply(context)
        inbox: queue.SimpleQueue[trust_pb2.WatchRequest | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=[requests, inbox], daemon=True).start()
        broker.watching += 1
        try:
            yield from self._responses(_read(hello.position) if hello.HasField("position") else None, inbox, context)
        finally:
            broker.watching -= 1

    def _read(
        self, requests: Iterator[trust_pb2.WatchRequest], inbox: queue.SimpleQueue[trust_pb2.WatchRequest | None]
    ) -> None:
        try:
            for request in requests:
                if request.HasField("goodbye"):
                    self._broker.goodbyes += 1
                    break
                self._broker.answers.append(request.answer)
                inbox.put(request)
        except grpc.RpcError:  # The caller is gone.
            pass
        inbox.put(None)
        self._broker.beat()

    def _responses(
        self,
        known: Position | None,
        inbox: queue.SimpleQueue[trust_pb2.WatchRequest | None],
        context: grpc.ServicerContext,
    ) -> Iterator[trust_pb2.WatchResponse]:
        broker, answered = self._broker, 0
        while True:
            broker.watch_faults.apply(context)
            while not inbox.empty():
                request = inbox.get()
                if request is None:
                    return
                answered = request.answer.number
            with broker.changed:
                if not broker.is_up:
                    return
                position = broker.position
                changes: Sequence[trust_pb2.RevocationChange | None] = broker.changes_since(known) or [None]
                new_keys = known is None or known.generation != position.generation
            for number, change in enumerate(changes):
                response = trust_pb2.WatchResponse(
                    position=_wire(position),
                    age=_duration(broker.age),
                    answered=answered,
                    heartbeat=_duration(broker.heartbeat),
                    key_set=self._published() if new_keys and number == 0 else None,
                    change=change,
                    live=True,
                )
                sent = response if broker.tamper is None else broker.tamper(response)
                if sent is not None:
                    yield sent
            known = position
            with broker.changed:
                if broker.position == known and inbox.empty():
                    broker.changed.wait(broker.heartbeat.total_seconds())

    def _published(self) -> trust_pb2.GetKeySetResponse:
        broker = self._broker
        return trust_pb2.GetKeySetResponse(
            issuer=broker.issuer,
            generation=broker.generation,
            jwks=broker.keys.to_json() if broker.key_set_text is None else broker.key_set_text,
            max_age=_duration(broker.max_age),
            age=_duration(broker.age),
        )


def wire_entry(entry: Revocation) -> trust_pb2.Revocation:
    """Return the message of a revocation."""
    message = trust_pb2.Revocation(
        version=entry.version, kind=_KINDS[entry.kind], value=entry.value, before_version=entry.before_version
    )
    if entry.expires_at is not None:
        message.expires_at.FromDatetime(entry.expires_at)
    return message


def _wire(position: Position) -> trust_pb2.Position:
    return trust_pb2.Position(
        epoch=position.epoch,
        generation=position.generation,
        revocation_version=position.revocation_version,
        revocation_digest=position.revocation_digest,
    )


def _read(message: trust_pb2.Position) -> Position:
    return Position(message.epoch, message.generation, message.revocation_version, message.revocation_digest)


def _duration(value: timedelta) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromTimedelta(value)
    return duration


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _abort(context: grpc.ServicerContext, refusal: _Refusal) -> NoReturn:
    details = [_packed(error_details_pb2.ErrorInfo(reason=refusal.reason, domain="carnet"))]
    if refusal.retry_after is not None:
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=_duration(refusal.retry_after))))
    status = status_pb2.Status(code=refusal.code.value[0], message=refusal.message, details=details)
    context.abort_with_status(rpc_status.to_status(status))
