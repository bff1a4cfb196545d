from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from carnet.cache import Failure, Issued, TokenKey
from carnet.endpoints import Failover, Target
from carnet.identity import Identity
from carnet.source.connections import Connections
from carnet.source.flight import Flight
from carnet.source.wire import Miss, issue_request, issued, miss_of, no_answer, refused
from carnet.testing.ca import CertificateAuthority
from carnet.v1 import token_pb2

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
KEY = TokenKey.of("thumb", "payments", ("charge",), None)
A, B = Target("a", 1), Target("b", 2)
DETAILS = "grpc-status-details-bin"


@dataclass(frozen=True)
class EndedCall:
    """What gRPC shows of a call that ended with an error."""

    status: grpc.StatusCode
    text: str | None = "no"
    metadata: tuple[tuple[str, bytes], ...] = ()

    def code(self) -> grpc.StatusCode:
        """The code."""
        return self.status

    def details(self) -> str | None:
        """The text."""
        return self.text

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """What came with it."""
        return self.metadata


@pytest.fixture(name="identity", scope="module")
def _identity() -> Identity:
    hour = timedelta(hours=1)
    ca = CertificateAuthority.create(now=NOW)
    orders = ca.issue("spiffe://prod.example/ns/shop/sa/orders", not_before=NOW - hour, not_after=NOW + hour)
    return Identity.parse(orders.certificate_pem, orders.private_key_pem)


def packed(message: Message) -> any_pb2.Any:
    """`message` as a detail of a status."""
    detail = any_pb2.Any()
    detail.Pack(message)
    return detail


def answer(**fields: object) -> token_pb2.IssueTokenResponse:
    """A broker's good answer, with `fields` changed."""
    good = {
        "token": "a.b.c",
        "expires_in": duration_pb2.Duration(seconds=300),
        "refresh_in": duration_pb2.Duration(seconds=150),
        "scopes": ["charge", "refund"],
    }
    return token_pb2.IssueTokenResponse(**(good | fields))


def rich_call(code: grpc.StatusCode, *details: Message, text: str = "no") -> EndedCall:
    """A call that ended with `details`."""
    status = status_pb2.Status(code=code.value[0], message=text, details=[packed(detail) for detail in details])
    return EndedCall(code, text, ((DETAILS, status.SerializeToString()),))


def test_request_says_what_is_wanted() -> None:
    """Audience, scopes and life go out; without a life the field is absent."""
    request = issue_request(TokenKey.of("t", "payments", ("b", "a"), timedelta(seconds=90)))
    assert ("payments", ["a", "b"], 90) == (request.audience, list(request.scopes), request.ttl.seconds)
    assert not issue_request(KEY).HasField("ttl")


def test_answer_becomes_a_token() -> None:
    """The end is the life counted from the moment of sending; the scopes are those of the answer."""
    result = issued(answer(), KEY, A, sent_at=NOW)
    assert isinstance(result, Issued)
    assert (timedelta(seconds=300), timedelta(seconds=150)) == (result.expires_in, result.refresh_in)
    assert ("a.b.c", "payments", ("charge", "refund"), NOW + timedelta(seconds=300), "thumb") == (
        result.token.value,
        result.token.audience,
        result.token.scopes,
        result.token.expires_at,
        result.token.identity_thumbprint,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"token": ""},
        {"token": "a b"},
        {"token": "a.b.c\r\nx-admin: true"},
        {"token": "x" * 8193},
        {"expires_in": duration_pb2.Duration(seconds=0)},
        {"expires_in": duration_pb2.Duration(seconds=-5)},
        {"expires_in": duration_pb2.Duration(seconds=10**10)},
        {"expires_in": duration_pb2.Duration(seconds=2**62)},
        {"expires_in": None},
        {"refresh_in": duration_pb2.Duration(seconds=2**62)},
        {"scopes": ["refund"]},
        {"scopes": []},
    ],
)
def test_answer_that_makes_no_sense_is_a_miss(fields: dict[str, object]) -> None:
    """No token, one that would break a header, no life, an endless one, or fewer scopes than asked for: not taken."""
    result = issued(answer(**fields), KEY, A, sent_at=NOW)
    assert isinstance(result, Miss)
    assert not result.is_from_broker
    assert not result.is_refusal


def test_reason_and_patience_are_read_from_the_details() -> None:
    """ErrorInfo of the broker's domain gives the reason, RetryInfo the time to wait."""
    info = error_details_pb2.ErrorInfo(reason="NO_SIGNING_KEY", domain="carnet")
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=3))
    miss = miss_of(rich_call(grpc.StatusCode.UNAVAILABLE, info, retry), A)
    assert ("NO_SIGNING_KEY", timedelta(seconds=3)) == (miss.reason, miss.retry_after)
    assert miss.is_from_broker
    assert not miss.is_refusal


def test_reason_of_another_domain_is_none() -> None:
    """What a proxy says of itself is not the broker's word."""
    info = error_details_pb2.ErrorInfo(reason="RATE_LIMITED", domain="proxy.example")
    miss = miss_of(rich_call(grpc.StatusCode.UNAVAILABLE, info), A)
    assert miss.reason is None
    assert not miss.is_from_broker


def odd_calls() -> Iterator[EndedCall]:
    """Calls whose details are not what they should be."""
    code = grpc.StatusCode.UNAVAILABLE
    yield EndedCall(code, None)
    yield EndedCall(code, "no", ((DETAILS, b"\xff\xff\xff"),))
    other = status_pb2.Status(code=7, message="no")
    yield EndedCall(code, "no", ((DETAILS, other.SerializeToString()),))
    broken = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
    status = status_pb2.Status(code=14, message="no", details=[broken])
    yield EndedCall(code, "no", ((DETAILS, status.SerializeToString()),))
    yield rich_call(code, error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2**62)))
    yield rich_call(code, duration_pb2.Duration(seconds=1))


@pytest.mark.parametrize("call", list(odd_calls()))
def test_odd_details_are_left_out(call: EndedCall) -> None:
    """Details that contradict the status, or that cannot be parsed, never hide the error itself."""
    miss = miss_of(call, A)
    assert (grpc.StatusCode.UNAVAILABLE, None, None) == (miss.code, miss.reason, miss.retry_after)


def test_long_text_of_a_server_is_cut() -> None:
    """A server cannot fill the log."""
    assert 300 == len(miss_of(EndedCall(grpc.StatusCode.UNKNOWN, "x" * 10_000), A).text)


def test_refusal_names_who_wanted_what_and_why_not(identity: Identity) -> None:
    """Audience, scopes, workload, the broker's text and its reason."""
    miss = Miss(A, grpc.StatusCode.PERMISSION_DENIED, "not granted", "SCOPE_NOT_GRANTED", None)
    failure = refused(miss, KEY, identity, now=NOW)
    assert "SCOPE_NOT_GRANTED" == failure.reason
    expected = (
        "no token for audience payments with scopes charge as spiffe://prod.example/ns/shop/sa/orders:"
        " not granted (SCOPE_NOT_GRANTED)"
    )
    assert expected == failure.message


def test_refusal_without_a_reason_has_the_name_of_its_code(identity: Identity) -> None:
    """A proxy that says no is still a no."""
    failure = refused(Miss(A, grpc.StatusCode.PERMISSION_DENIED, "", None, None), KEY, identity, now=NOW)
    assert "PERMISSION_DENIED" == failure.reason
    assert "refused (PERMISSION_DENIED)" in failure.message


@pytest.mark.parametrize(("seconds", "hint"), [(3599, False), (3600, True), (3601, True)])
def test_refusal_of_a_certificate_that_ended_says_so(identity: Identity, seconds: int, hint: bool) -> None:
    """An open connection outlives its certificate, and the broker then refuses the call."""
    miss = Miss(A, grpc.StatusCode.UNAUTHENTICATED, "no", "UNAUTHENTICATED", None)
    failure = refused(miss, KEY, identity, now=NOW + timedelta(seconds=seconds))
    assert hint == ("your certificate ended at 2026-11-24T13:00:00Z, renew it" in failure.message)


def test_every_broker_that_was_asked_is_named(identity: Identity) -> None:
    """The error lists each server with what it said; patience counts only where all ask for it."""
    patient = Miss(A, grpc.StatusCode.UNAVAILABLE, "later", "NO_KEYRING", timedelta(seconds=9))
    silent = Miss(B, grpc.StatusCode.DEADLINE_EXCEEDED, "", None, None)
    both = no_answer([patient, silent], KEY, identity, broker_name="broker.example", now=NOW)
    assert "no broker answered (a:1: later; b:2: DEADLINE_EXCEEDED)" in both.message
    assert both.retry_after is None
    alone = no_answer([patient], KEY, identity, broker_name="broker.example", now=NOW)
    assert timedelta(seconds=9) == alone.retry_after
    assert alone.message.endswith("(a:1: later)")


def flight_of(identity: Identity, *targets: Target) -> Flight:
    """A request that may ask `targets`."""
    return Flight(KEY, identity, "broker.example", list(targets), background=False)


def test_request_goes_from_broker_to_broker_until_one_answers(identity: Identity) -> None:
    """A miss leads to the next broker, which is then the first to be asked."""
    flight, failover = flight_of(identity, A, B), Failover([A, B])
    assert A == flight.next_target(mono=5, now=NOW)
    miss = Miss(A, grpc.StatusCode.UNAVAILABLE, "down", None, None)
    assert flight.answered(miss, failover, mono=5, now=NOW) is None
    assert B == flight.next_target(mono=6, now=NOW)
    assert 6 == flight.sent
    good = issued(answer(), KEY, B, sent_at=NOW)
    assert good is flight.answered(good, failover, mono=6, now=NOW)
    assert [B, A] == failover.order(7)


def test_request_fails_after_the_last_broker(identity: Identity) -> None:
    """When all were asked the request has failed, and says of each why."""
    flight, failover = flight_of(identity, A), Failover([A])
    flight.next_target(mono=0, now=NOW)
    ended = flight.answered(Miss(A, grpc.StatusCode.UNAVAILABLE, "down", None, None), failover, mono=0, now=NOW)
    assert isinstance(ended, Failure)
    assert ended.reason is None


def test_answer_to_nothing_is_a_mistake_of_ours(identity: Identity) -> None:
    """A second answer to one call cannot be, and is not passed over."""
    with pytest.raises(RuntimeError, match="nobody asked"):
        flight_of(identity, A).answered(issued(answer(), KEY, A, sent_at=NOW), Failover([A]), mono=0, now=NOW)


def test_late_caller_hears_of_the_broker_that_is_silent(identity: Identity) -> None:
    """Who cannot wait longer is told whose answer is missing, if anybody was asked yet."""
    flight = flight_of(identity, A)
    assert "no broker answered in time" in flight.late(timedelta(seconds=1), NOW).message
    flight.next_target(mono=0, now=NOW)
    assert "a:1: no answer within 0.2 s" in flight.late(timedelta(milliseconds=200), NOW).message


def test_connection_is_shared_until_a_call_on_it_failed(identity: Identity) -> None:
    """Calls share a connection; one that failed is not used again, and is closed after its last call."""
    connections = Connections(lambda target, _: object())
    first, second = (connections.take(A, identity) for _ in range(2))
    assert first is second
    assert [] == connections.give_back(first, failed=True)
    third = connections.take(A, identity)
    assert third is not first
    assert [first.channel] == connections.give_back(second, failed=True)
    assert [] == connections.give_back(third, failed=False)


def test_connections_of_other_identities_are_let_go(identity: Identity) -> None:
    """What nobody needs is closed at once where it is idle, else after its last call."""
    connections = Connections(lambda target, _: object())
    idle, busy = connections.take(A, identity), connections.take(B, identity)
    connections.give_back(idle, failed=False)
    assert [] == connections.keep({identity.thumbprint})
    assert [idle.channel] == connections.keep(())
    assert [busy.channel] == connections.give_back(busy, failed=False)
