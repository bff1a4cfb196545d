"""One line in the audit record for each call that is refused, whoever refuses it. A whole broker, over real TLS."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import grpc
import pytest

from carnet import Identity
from carnet.v1 import token_pb2, token_pb2_grpc, trust_pb2, trust_pb2_grpc
from support.mtls_server import Target, grpc_channel
from support.running_broker import BROKER_NAME, POLICY, RunningBroker, reason_of, start_broker
from support.vault import prepare
from wrong_certificates import WRONG_CERTIFICATES

# Each case has a caller of its own, because refusals are capped for each identity.
CALLERS = "spiffe://prod.example/ns/audit/sa"
OWN_POLICY = POLICY + f"  - {{ workload: {CALLERS}/*, audience: payments, scopes: [charge] }}\n"
LIMITS = {"tokens_per_second": 10, "token_burst": 64, "read_within": "500ms"}
Record = dict[str, Any]
numbers = count()


@pytest.fixture(name="broker", scope="module")
def _broker(openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    directory = tmp_path_factory.mktemp("broker")
    place = prepare(openbao, directory / "login")
    with start_broker(place, directory / "broker", policy=OWN_POLICY, settings={"limits": LIMITS}) as running:
        yield running
    place.close()


def refusals(broker: RunningBroker, subject: str | None) -> list[Record]:
    """Return all refusals of a caller that are on record, once those before this moment are written."""
    marker = f"marker{next(numbers)}"
    with pytest.raises(grpc.RpcError):
        broker.issue(marker, identity=broker.identity(f"spiffe://prod.example/ns/marker/sa/{marker}"))
    # They are written in their order, so whatever came before the marker is there when the marker is.
    broker.wait_for(lambda: any(marker == record.get("aud") for record in refused(broker)), "the marker")
    return [record for record in refused(broker) if subject == record.get("sub")]


def refused(broker: RunningBroker) -> list[Record]:
    """Return the refusals on record."""
    return [record for record in broker.audited() if record["kind"] == "refusal"]


def issued(broker: RunningBroker, identity: Identity) -> list[Record]:
    """Return what is on record as issued to a caller."""
    subject = str(identity.spiffe_id)
    return [record for record in broker.audited() if record["kind"] == "issue" and subject == record["sub"]]


@dataclass(frozen=True)
class Refused:
    """One way to be refused at the token service, and what the record has of it."""

    name: str
    ask: Callable[[grpc.Channel], object]
    reason: str
    told: dict[str, Any]
    """Beside reason, subject and certificate."""
    life: timedelta = timedelta(hours=1)


def one(audience: str, *scopes: str, ttl: int | None = None) -> Callable[[grpc.Channel], object]:
    """Ask for one token."""
    request = token_pb2.IssueTokenRequest(audience=audience, scopes=scopes)
    if ttl is not None:
        request.ttl.seconds = ttl
    return lambda channel: token_pb2_grpc.TokenServiceStub(channel).IssueToken(request, timeout=10)


def many(*audiences: str) -> Callable[[grpc.Channel], token_pb2.IssueTokensResponse]:
    """Ask for several in one call."""
    requests = [token_pb2.IssueTokenRequest(audience=audience) for audience in audiences]
    batch = token_pb2.IssueTokensRequest(requests=requests)
    return lambda channel: token_pb2_grpc.TokenServiceStub(channel).IssueTokens(batch, timeout=10)


def greedy(channel: grpc.Channel) -> object:
    """Ask for all that is admitted at once, twice."""
    ask = many(*["payments"] * 64)
    ask(channel)
    return ask(channel)


def silent(channel: grpc.Channel) -> object:
    """Begin a call, and send no request."""

    def nothing() -> Iterator[bytes]:
        time.sleep(2)
        yield b""

    return channel.stream_unary("/carnet.v1.TokenService/IssueToken")(nothing(), timeout=10)


CASES = (
    Refused("no-grant", one("bank", "transfer"), "NOT_GRANTED", {"aud": "bank", "scope": ["transfer"]}),
    Refused("scope", one("payments", "refund"), "SCOPE_NOT_GRANTED", {"aud": "payments", "scope": ["refund"]}),
    Refused("malformed", one("pay\nments"), "INVALID_REQUEST", {}),
    Refused("ttl", one("payments", ttl=0), "INVALID_REQUEST", {}),
    Refused("empty-batch", many(), "INVALID_REQUEST", {}),
    Refused("large-batch", many(*["payments"] * 65), "INVALID_REQUEST", {}),
    Refused("too-many", greedy, "TOO_MANY_REQUESTS", {}),
    Refused("ending", one("payments"), "CERTIFICATE_ENDING", {"aud": "payments"}, timedelta(seconds=20)),
    Refused("silent", silent, "SLOW_REQUEST", {}),
)


def caller(broker: RunningBroker, name: str, life: timedelta = timedelta(hours=1)) -> Identity:
    """Return a caller that has a grant for payments."""
    return broker.identity(f"{CALLERS}/{name}", not_after=datetime.now(UTC).replace(microsecond=0) + life)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_refused_call_is_one_line_of_the_audit_record(case: Refused, broker: RunningBroker):
    """Who, by which certificate, why, and what was asked for where that was well formed."""
    identity = caller(broker, case.name, case.life)
    with broker.channel(identity) as channel, pytest.raises(grpc.RpcError) as caught:
        case.ask(channel)
    assert case.reason == reason_of(caught.value)

    (record,) = refusals(broker, str(identity.spiffe_id))
    assert (case.reason, identity.thumbprint) == (record["reason"], record["certificate"])
    assert case.told == {name: record[name] for name in ("aud", "scope") if name in record}


def test_a_call_that_is_granted_leaves_no_refusal(broker: RunningBroker):
    """The accepted twin: its line is that of the issue."""
    identity = caller(broker, "granted")
    broker.issue("payments", identity=identity)

    assert [] == refusals(broker, str(identity.spiffe_id))
    assert 1 == len(issued(broker, identity))


def test_in_a_batch_each_request_that_is_refused_is_one_line(broker: RunningBroker):
    """The others of it are issued, and on record as that."""
    identity = caller(broker, "batch")
    with broker.channel(identity) as channel:
        many("payments", "bank", "", "payments")(channel)

    recorded = refusals(broker, str(identity.spiffe_id))
    assert [("NOT_GRANTED", "bank"), ("INVALID_REQUEST", None)] == [
        (record["reason"], record.get("aud")) for record in recorded
    ]
    assert 2 == len(issued(broker, identity))


@contextmanager
def stranger(broker: RunningBroker, kind: str, listener: str = "tokens") -> Iterator[grpc.Channel]:
    """Connect with a certificate that the handshake accepts and our rules do not."""
    target = Target(broker.addresses[listener], BROKER_NAME, broker.ca.root_pem)
    with grpc_channel(target, WRONG_CERTIFICATES[kind].build(broker.ca, datetime.now(UTC))) as channel:
        yield channel


def key_set(channel: grpc.Channel) -> object:
    """Ask for the keys."""
    return trust_pb2_grpc.TrustServiceStub(channel).GetKeySet(trust_pb2.GetKeySetRequest(), timeout=10)


@pytest.mark.parametrize(
    ("listener", "ask"), [("tokens", one("payments")), ("trust", key_set)], ids=["tokens", "trust"]
)
@pytest.mark.parametrize(
    ("kind", "reason"), [("T03-no-usage", "EXTENDED_KEY_USAGE"), ("T04-ca", "NOT_A_LEAF"), ("T06-two-ids", "SPIFFE_ID")]
)
def test_a_caller_that_is_nobody_is_one_line_with_its_address(
    kind: str, reason: str, listener: str, ask: Callable[[grpc.Channel], object], broker: RunningBroker
):
    """With the reason that it is not told, and no subject: a name in a certificate that is not accepted is nobody's."""
    before = len(refusals(broker, None))
    with stranger(broker, kind, listener) as channel, pytest.raises(grpc.RpcError) as caught:
        ask(channel)
    assert "UNAUTHENTICATED" == reason_of(caught.value)

    (record,) = refusals(broker, None)[before:]
    assert reason == record["reason"]
    assert record["peer"].startswith("ipv4:127.0.0.1:")
    assert record["detail"]
    assert not {"sub", "certificate", "aud"} & set(record)


def test_b10_a_name_with_a_line_feed_stays_inside_its_line(broker: RunningBroker):
    """What a stranger writes into its certificate is quoted in the detail, escaped."""
    before = len(refusals(broker, None))
    with stranger(broker, "T07-line-feed") as channel, pytest.raises(grpc.RpcError):
        one("payments")(channel)

    (record,) = refusals(broker, None)[before:]
    assert ("SPIFFE_ID", True) == (record["reason"], bool(record["detail"]))


def test_b14_a_call_that_is_refused_for_the_audit_record_is_told_there_when_it_can_be(broker: RunningBroker):
    """The files of issues are gone: that call is refused, and its line is in the file of refusals, with the cause."""
    identity = caller(broker, "unrecorded")
    for file in broker.audit_directory.glob("issued-*"):
        file.unlink()
    with broker.channel(identity) as channel, pytest.raises(grpc.RpcError) as caught:
        one("payments")(channel)
    assert "AUDIT_UNAVAILABLE" == reason_of(caught.value)

    (record,) = refusals(broker, str(identity.spiffe_id))
    assert "AUDIT_UNAVAILABLE" == record["reason"]
    assert "deleted" in record["detail"]
    broker.wait_for(lambda: broker.readiness()["ready"], "a new file")
    assert broker.issue("payments", identity=identity).token


def test_a_call_that_vault_does_not_sign_is_an_intent_and_a_refusal(own_openbao, tmp_path):
    """The intent counts as issued; the refusal says that no token came of it, and why."""
    place = prepare(own_openbao, tmp_path / "login")
    settings = {"keys": {"store": "transit"}}
    with start_broker(place, tmp_path / "broker", policy=OWN_POLICY, settings=settings) as broker:
        own_openbao.seal()
        identity = caller(broker, "unsigned")
        with broker.channel(identity) as channel, pytest.raises(grpc.RpcError) as caught:
            one("payments")(channel)
        assert "KEY_STORE_UNAVAILABLE" == reason_of(caught.value)
        broker.wait_for(lambda: refused(broker), "the refusal")
        (record,) = refused(broker)
        assert ("KEY_STORE_UNAVAILABLE", str(identity.spiffe_id)) == (record["reason"], record["sub"])
        assert record["detail"]
        assert 1 == len(issued(broker, identity))
    own_openbao.unseal()
    place.close()
