"""What CI and breakglass may ask of the keyring, and what they are told."""

from __future__ import annotations

from datetime import datetime

import pytest

from carnet_broker.core.keyring import Hold, Keyring, Wait, Wish
from carnet_broker.core.requests import (
    NAMED_LAGGARDS,
    RequestKind,
    RequestResult,
    RequestStatus,
    RotationRequest,
    judge,
    wish_of,
)
from support.keyrings import ISSUER, SECOND, T0, TIMING, jwk, running

SKEW = TIMING.skew
FREE_AT = T0 + TIMING.min_interval


def request(
    kind: RequestKind = RequestKind.ROTATE,
    at: datetime = FREE_AT,
    *,
    breakglass: bool = False,
    kid: str | None = None,
    request_id: str = "r1",
) -> RotationRequest:
    """Return a request that is made when CI may rotate again."""
    return RotationRequest(request_id, kind, at, breakglass, kid)


def judged(asked: RotationRequest, keyring: Keyring | None = None) -> RequestResult:
    """Judge with the test's timing, long after."""
    return judge(asked, running() if keyring is None else keyring, timing=TIMING)


def test_a_request_waits_for_the_pollers_and_is_told_until_when():
    """ACCEPTED, with the standby and the earliest activation: a guess, or what the plan says where that is known."""
    result = judged(request())
    assert (RequestStatus.ACCEPTED, "WAITING_FOR_POLLERS") == (result.status, result.reason)
    ready = T0 + TIMING.replica_lag + TIMING.poller_window
    assert (jwk(1).kid, ready.isoformat()) == (result.detail["standby_kid"], result.detail["not_before"])
    ends = T0 + 500 * SECOND
    result = judge(request(), running(), timing=TIMING, wait=Wait(ends, Hold.POLLERS, ends))
    assert ("WAITING_FOR_POLLERS", ends.isoformat()) == (result.reason, result.detail["not_before"])
    assert "deadline" not in result.detail


def test_a_request_that_waits_for_verifiers_is_told_which_and_until_when():
    """The first twenty by name, how many there are, and the deadline at which they are left behind."""
    deadline = T0 + 500 * SECOND
    names = [f"spiffe://prod.example/ns/shop/sa/payments pod-{number}" for number in range(NAMED_LAGGARDS + 5)]
    wait = Wait(deadline, Hold.VERIFIERS, deadline)
    result = judge(request(), running(), timing=TIMING, wait=wait, laggards=names)
    assert (RequestStatus.ACCEPTED, "WAITING_FOR_VERIFIERS") == (result.status, result.reason)
    assert (names[:20], 25, deadline.isoformat()) == (
        result.detail["waiting_for"],
        result.detail["missing"],
        result.detail["deadline"],
    )
    assert "not_before" not in result.detail


@pytest.mark.parametrize("hold", [Hold.STORE, Hold.REPLICAS])
def test_a_request_is_told_what_else_is_missing(hold):
    """A store that does not answer, or a broker that has not loaded the standby; nobody is named for it."""
    result = judge(request(), running(), timing=TIMING, wait=Wait(None, hold))
    assert (RequestStatus.ACCEPTED, str(hold)) == (result.status, result.reason)
    assert {"waiting_for", "deadline"}.isdisjoint(result.detail)
    assert 4 == len({judge(request(), running(), timing=TIMING, wait=Wait(None, each)).message for each in Hold})


def test_a_request_to_an_empty_keyring_waits():
    """Before the first key there is nothing to rotate, and the first activation will answer it."""
    result = judged(request(), Keyring(issuer=ISSUER))
    assert (RequestStatus.ACCEPTED, {"generation": 0}) == (result.status, result.detail)


def test_an_activation_answers_the_requests_that_it_names():
    """By id, whatever the clocks say, and also when a later rotation has come since."""
    late = FREE_AT + 1000 * SECOND
    keyring = running().with_activated(jwk(1).kid, FREE_AT, TIMING, answers=["r1"])
    for asked in (request(at=late), request(RequestKind.ROTATE_NOW, late, breakglass=True)):
        assert (RequestStatus.DONE, "ROTATED") == (judged(asked, keyring).status, judged(asked, keyring).reason)
    assert RequestStatus.DONE is not judged(request(at=late, request_id="r2"), keyring).status


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (T0 - SECOND, "ROTATED"),
        (T0 + SKEW, "ROTATED"),
        (T0 + SKEW + SECOND, "TOO_SOON"),
        (FREE_AT - SECOND, "TOO_SOON"),
        (FREE_AT, "WAITING_FOR_POLLERS"),
    ],
)
def test_a_ci_request_joins_or_comes_too_soon_or_is_accepted(at, expected):
    """Made before the activation (within skew) it joined it; then the minimum interval holds, to the second."""
    result = judged(request(at=at))
    assert expected == result.reason
    if expected == "TOO_SOON":
        assert (RequestStatus.REFUSED, FREE_AT.isoformat()) == (result.status, result.detail["not_before"])


def test_breakglass_has_no_minimum_interval_and_does_not_join_by_the_clock():
    """Who says "now" wants a key that did not sign before."""
    result = judged(request(RequestKind.ROTATE_NOW, T0, breakglass=True))
    assert RequestStatus.ACCEPTED is result.status


@pytest.mark.parametrize("kind", [RequestKind.ROTATE_NOW, RequestKind.REVOKE])
def test_what_takes_breakglass_is_refused_at_the_door_of_ci(kind):
    """The door is a path in Vault, so the caller cannot claim it."""
    result = judged(request(kind, kid=jwk(0).kid))
    assert (RequestStatus.REFUSED, "BREAKGLASS_REQUIRED") == (result.status, result.reason)


def test_a_revocation_is_accepted_then_done_and_an_unknown_key_is_refused():
    """The result follows the keyring."""
    asked = request(RequestKind.REVOKE, breakglass=True, kid=jwk(0).kid)
    assert (RequestStatus.ACCEPTED, "REVOKING") == (judged(asked).status, judged(asked).reason)
    revoked = running().with_revoked(jwk(0).kid, T0, TIMING)
    assert (RequestStatus.DONE, "REVOKED") == (judged(asked, revoked).status, judged(asked, revoked).reason)
    for kid in (jwk(7).kid, None):
        unknown = judged(request(RequestKind.REVOKE, breakglass=True, kid=kid))
        assert (RequestStatus.REFUSED, "UNKNOWN_KEY") == (unknown.status, unknown.reason)


def test_only_accepted_requests_become_a_wish():
    """What is done, refused or too soon moves nothing."""
    asked = [
        request(at=FREE_AT + SECOND, request_id="later"),
        request(),
        request(at=T0 + SKEW + SECOND, request_id="too-soon"),
        request(RequestKind.ROTATE_NOW, request_id="no-breakglass"),
        request(RequestKind.REVOKE, breakglass=True, kid=jwk(0).kid, request_id="revoke"),
    ]
    assert Wish(rotate_since=FREE_AT, revoke=(jwk(0).kid,)) == wish_of(asked, running(), timing=TIMING)
    now = [request(RequestKind.ROTATE_NOW, breakglass=True)]
    assert Wish(rotate_now=True) == wish_of(now, running(), timing=TIMING)
    assert Wish() == wish_of([], running(), timing=TIMING)
