"""Requests to the keyring: what CI and breakglass may ask for, and the answer to each.

Rules
-----
1. A request is satisfied by the first activation that comes after it was made, whoever caused that: so requests made
   while a rotation is under way join it, and two CI jobs at the same moment cause one rotation.
2. An activation names the requests that it answers. A CI request that was seen only after it still counts as made
   before when its time says so; that time is Vault's, the activation's a broker's, so they may be `skew` apart. For
   breakglass only the name counts: it asks for a key that did not sign before it asked.
3. CI may ask for one rotation in `min_interval`. A request that comes sooner is refused, with the time to wait.
4. To rotate without waiting for verifiers, and to revoke a key, takes breakglass.
5. Who waits is told what for: which window, which verifiers, and until when at the latest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from carnet_broker.core.keyring import Hold, Keyring, KeyState, Timing, Wait, Wish

__all__ = ["NAMED_LAGGARDS", "RequestKind", "RequestResult", "RequestStatus", "RotationRequest", "judge", "wish_of"]

NAMED_LAGGARDS: Final = 20
"""How many verifiers an answer names."""

_WAITS: Final = {
    Hold.STORE: "a new key needs the shared store, which does not answer",
    Hold.REPLICAS: "the standby key becomes the signer when every broker serves it and every verifier can have it",
    Hold.POLLERS: "the standby key becomes the signer when every verifier can have it",
    Hold.VERIFIERS: "the standby key becomes the signer when every live verifier has loaded it",
}


class RequestKind(StrEnum):
    """What a request asks for."""

    ROTATE = "rotate"
    """Make the standby key the signer, as soon as no verifier can miss it."""
    ROTATE_NOW = "rotate-now"
    """The same without waiting for verifiers. Breakglass only."""
    REVOKE = "revoke"
    """Stop trusting a key at once. Breakglass only."""


class RequestStatus(StrEnum):
    """How a request stands."""

    ACCEPTED = "accepted"
    DONE = "done"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class RequestResult:
    """The answer to a request; it may change from ACCEPTED to DONE or REFUSED, and not after."""

    status: RequestStatus
    reason: str
    """A code: ``WAITING_FOR_STORE``, ``WAITING_FOR_REPLICAS``, ``WAITING_FOR_POLLERS``, ``WAITING_FOR_VERIFIERS``,
    ``ROTATED``, ``REVOKING``, ``REVOKED``, ``TOO_SOON``, ``BREAKGLASS_REQUIRED``, ``UNKNOWN_KEY``, ``UNREADABLE``."""
    message: str
    detail: dict[str, Any] = field(default_factory=dict)
    """Figures for machines: generation, kids, times in ISO 8601; `waiting_for` names verifiers that have not loaded
    the key, `missing` is how many those are, and at `deadline` they are left behind."""


@dataclass(frozen=True, slots=True)
class RotationRequest:
    """One request that waits in Vault. `created_at` is Vault's time, `breakglass` says which door it came by."""

    request_id: str
    kind: RequestKind
    created_at: datetime
    breakglass: bool
    kid: str | None = None
    """The key to revoke; None for the other kinds."""
    result: RequestResult | None = None
    """The answer so far, None before the first."""


def judge(
    request: RotationRequest,
    keyring: Keyring,
    *,
    timing: Timing,
    wait: Wait | None = None,
    laggards: Sequence[str] = (),
) -> RequestResult:
    """Return the answer to `request` as the keyring stands.

    `wait` says what the plan waits for, where that is known, and `laggards` names the verifiers among that.
    """
    if request.kind is not RequestKind.ROTATE and not request.breakglass:
        message = f"{request.kind} needs the carnet-breakglass role"
        return RequestResult(RequestStatus.REFUSED, "BREAKGLASS_REQUIRED", message)
    if request.kind is RequestKind.REVOKE:
        return _judge_revocation(request, keyring)
    active, standby = keyring.active, keyring.standby
    detail: dict[str, Any] = {"generation": keyring.generation}
    if active is not None and active.activated_at is not None:
        activated_at = active.activated_at
        detail |= {"active_kid": active.kid, "activated_at": activated_at.isoformat()}
        joined = request.kind is RequestKind.ROTATE and request.created_at <= activated_at + timing.skew
        if joined or any(request.request_id in key.answers for key in keyring.keys):
            message = f"key {active.kid} signs since {activated_at.isoformat(timespec='seconds')}"
            return RequestResult(RequestStatus.DONE, "ROTATED", message, detail)
        free_at = activated_at + timing.min_interval
        if request.kind is RequestKind.ROTATE and request.created_at < free_at:
            message = (
                f"the last rotation was at {activated_at.isoformat(timespec='seconds')}; CI may rotate again from"
                f" {free_at.isoformat(timespec='seconds')} (breakglass may use --now)"
            )
            return RequestResult(
                RequestStatus.REFUSED, "TOO_SOON", message, detail | {"not_before": free_at.isoformat()}
            )
    hold = wait.hold if wait is not None and wait.hold is not None else Hold.POLLERS
    ends = wait.hold_ends if wait is not None else None
    if standby is not None and standby.published_at is not None:
        detail["standby_kid"] = standby.kid
        if hold is not Hold.VERIFIERS:
            not_before = standby.published_at + timing.replica_lag + timing.poller_window
            detail["not_before"] = (not_before if ends is None else ends).isoformat()
    if hold is Hold.VERIFIERS and ends is not None:
        detail |= {"waiting_for": list(laggards[:NAMED_LAGGARDS]), "missing": len(laggards)}
        detail["deadline"] = ends.isoformat()
    return RequestResult(RequestStatus.ACCEPTED, str(hold), _WAITS[hold], detail)


def _judge_revocation(request: RotationRequest, keyring: Keyring) -> RequestResult:
    """Return the answer to a request to revoke a key."""
    key = keyring.get(request.kid) if request.kid is not None else None
    detail: dict[str, Any] = {"generation": keyring.generation, "kid": request.kid}
    if key is None:
        message = "the keyring has no key of that name; `carnet-broker keys status` lists them"
        return RequestResult(RequestStatus.REFUSED, "UNKNOWN_KEY", message, detail)
    if key.state is KeyState.REVOKED:
        return RequestResult(RequestStatus.DONE, "REVOKED", f"key {key.kid} is revoked", detail)
    return RequestResult(RequestStatus.ACCEPTED, "REVOKING", f"key {key.kid} is about to be revoked", detail)


def wish_of(requests: Iterable[RotationRequest], keyring: Keyring, *, timing: Timing) -> Wish:
    """Return what the accepted among `requests` want of the keyring."""
    accepted = [
        request for request in requests if judge(request, keyring, timing=timing).status is RequestStatus.ACCEPTED
    ]
    kinds = {request.kind for request in accepted}
    return Wish(
        rotate_since=min((one.created_at for one in accepted if one.kind is RequestKind.ROTATE), default=None),
        rotate_now=RequestKind.ROTATE_NOW in kinds,
        revoke=tuple(request.kid for request in accepted if request.kind is RequestKind.REVOKE and request.kid),
    )
