"""The records of the ledger, and the one way that each becomes a line.

Rules:

- A record is one line of printable ASCII: a JSON object and a line feed. Whatever a peer puts into a field, it can
  neither end the line, nor start another, nor steer a terminal that shows it (CR LF, U+2028, ESC and DEL are escaped).
- A field is cut at a stated length, and says so. A line is at most `MAX_LINE_BYTES`.
- An issue is recorded whole: its fields were checked. A refusal holds what a stranger sent, as often as it sends it, so
  its fields are cut by what they take in the file, and its line is at most `MAX_REFUSAL_BYTES`.
- A token is never in a record. Its name (`jti`), which revokes it, is.
- An issue is recorded before the token exists, so it is an intent: it counts as issued, although the token may never
  have left.
- Where a member means what a claim of the token means, it has the name of the claim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

__all__ = [
    "MAX_LINE_BYTES",
    "MAX_REFUSAL_BYTES",
    "DroppedRecord",
    "DurableRecord",
    "IssueRecord",
    "KeyRevocationRecord",
    "OpenedRecord",
    "RefusalRecord",
    "RevocationRecord",
]

MAX_LINE_BYTES: Final = 256 * 1024
"""No line is longer, whatever its fields hold. The line of an issue is about 500 bytes."""

MAX_REFUSAL_BYTES: Final = 4096
"""No line about a refusal is longer. The fields without the scopes take less, and scopes the rest."""

_VERSION: Final = 1
"""The form of the lines, their member ``v``."""

_LONGEST_ESCAPE: Final = 12
"""Bytes of one character, escaped: two surrogates of six each (RFC 8259 section 7)."""

_MAX_TEXT: Final = 256
"""Characters of a short field; in a refusal, bytes of its escaped form."""

_MAX_SPIFFE_ID: Final = 2048
"""Characters of a SPIFFE ID (SPIFFE ID section 2.3), all of them ASCII."""

_MAX_SCOPES: Final = 64
"""Scopes of an issue. A token has no more."""

_MAX_SCOPES_REFUSED: Final = 8
"""Scopes of a refusal: what was asked for is seen from the first ones, and the record has their count."""

_MAX_SCOPE: Final = 128
"""Characters of a scope."""

_encode: Final = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class OpenedRecord:
    """The first line of each file: who writes it, and since when."""

    at: datetime
    writer: str
    """The process: host name and process id."""

    def to_line(self) -> bytes:
        """Return the record as a line."""
        return _line("opened", self.at, {"writer": _text(self.writer, _MAX_TEXT)})


@dataclass(frozen=True, slots=True)
class IssueRecord:
    """A token is about to be signed: the intent. All of this was checked before; nothing here is the peer's word."""

    at: datetime
    """When it was decided; also the ``iat`` of the token."""
    token_id: str
    """Its ``jti``."""
    kid: str
    """The key that is going to sign."""
    subject: str
    """The workload that the token is going to speak for."""
    audience: str
    scopes: tuple[str, ...]
    expires_at: datetime
    certificate: str
    """The caller's leaf, by its ``x5t#S256``; also where the token is not bound to it."""
    policy: str
    """The version of the policy that decided."""
    rule: str = ""
    """The grant that decided, as its policy names it."""
    bound: bool = True
    """Whether the token is bound to `certificate`."""

    def to_line(self) -> bytes:
        """Return the record as a line."""
        members: dict[str, Any] = {
            "jti": _text(self.token_id, _MAX_TEXT),
            "kid": _text(self.kid, _MAX_TEXT),
            "sub": _text(self.subject, _MAX_SPIFFE_ID),
            "aud": _text(self.audience, _MAX_TEXT),
            "scope": _scopes(self.scopes),
            "exp": _time(self.expires_at),
            "certificate": _text(self.certificate, _MAX_TEXT),
            "bound": self.bound,
            "policy": _text(self.policy, _MAX_TEXT),
        }
        if self.rule:
            members["rule"] = _text(self.rule, _MAX_TEXT)
        return _line("issue", self.at, members)


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationRecord:
    """Something was revoked: it is in the log of revocations, whatever becomes of this record."""

    at: datetime
    """When the store had it, by the store's clock."""
    epoch: int
    version: int
    """Its place in the log of revocations."""
    what: str
    """The kind of the revocation."""
    value: str
    before_version: int
    expires_at: datetime | None
    by: str
    """The SPIFFE ID of whoever asked."""
    certificate: str
    """The leaf of whoever asked, by its ``x5t#S256``."""
    reason: str = ""

    def to_line(self) -> bytes:
        """Return the record as a line."""
        members: dict[str, Any] = {
            "epoch": self.epoch,
            "version": self.version,
            "what": _text(self.what, _MAX_TEXT),
            "value": _text(self.value, _MAX_SPIFFE_ID),
            "by": _text(self.by, _MAX_SPIFFE_ID),
            "certificate": _text(self.certificate, _MAX_TEXT),
        }
        if self.before_version:
            members["before_version"] = self.before_version
        if self.expires_at is not None:
            members["expires_at"] = _time(self.expires_at)
        if self.reason:
            members["reason"] = _text(self.reason, _MAX_TEXT)
        return _line("revocation", self.at, members)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRevocationRecord:
    """A signing key was revoked: no verifier that has the key set of this generation trusts it."""

    at: datetime
    kid: str
    generation: int
    """The keyring's, in which it is revoked."""
    active: str
    """The key that signs since, empty where there is none."""
    by: str
    """The SPIFFE ID of whoever asked."""
    certificate: str
    """The leaf of whoever asked, by its ``x5t#S256``."""
    peer: str
    """The address of the other side."""

    def to_line(self) -> bytes:
        """Return the record as a line."""
        members: dict[str, Any] = {
            "kid": _text(self.kid, _MAX_TEXT),
            "generation": self.generation,
            "active": _text(self.active, _MAX_TEXT),
            "by": _text(self.by, _MAX_SPIFFE_ID),
            "certificate": _text(self.certificate, _MAX_TEXT),
            "peer": _text(self.peer, _MAX_TEXT),
        }
        return _line("key_revocation", self.at, members)


DurableRecord: TypeAlias = IssueRecord | RevocationRecord | KeyRevocationRecord
"""What is durable before anybody is answered."""


@dataclass(frozen=True, slots=True)
class RefusalRecord:
    """Something was refused. `audience`, `scopes` and `detail` may hold the peer's own words. Empty means unknown."""

    at: datetime
    reason: str
    """The code, as in ``google.rpc.ErrorInfo``."""
    subject: str = ""
    """The SPIFFE ID of the caller, empty where it was not authenticated. Refusals are capped by it."""
    audience: str = ""
    """What was asked for."""
    scopes: tuple[str, ...] = ()
    """What was asked for. The first 8 are recorded while there is room, and the count of all where some are not."""
    certificate: str = ""
    """The caller's leaf, by its ``x5t#S256``."""
    policy: str = ""
    """The version of the policy that decided."""
    peer: str = ""
    """The address of the other side."""
    detail: str = ""
    """The cause that only we are told."""

    def to_line(self) -> bytes:
        """Return the record as a line."""
        members: dict[str, Any] = {"reason": _cut(self.reason, _MAX_TEXT)}
        for name, value, limit in (
            ("sub", self.subject, _MAX_SPIFFE_ID),
            ("aud", self.audience, _MAX_TEXT),
            ("certificate", self.certificate, _MAX_TEXT),
            ("policy", self.policy, _MAX_TEXT),
            ("peer", self.peer, _MAX_TEXT),
            ("detail", self.detail, _MAX_TEXT),
        ):
            if value:
                members[name] = _cut(value, limit)
        scopes = [_cut(scope, _MAX_SCOPE) for scope in self.scopes[:_MAX_SCOPES_REFUSED]]
        while True:
            if scopes:
                members["scope"] = scopes
            if len(scopes) < len(self.scopes):
                members["scopes_asked"] = len(self.scopes)
            line = _line("refusal", self.at, members)
            if len(line) <= MAX_REFUSAL_BYTES:
                return line
            scopes.pop()  # There are some: without them the line is shorter.


@dataclass(frozen=True, slots=True)
class DroppedRecord:
    """`count` refusals since `since` were not recorded: too many of one identity, too fast, or no space to spare."""

    at: datetime
    since: datetime
    count: int

    def to_line(self) -> bytes:
        """Return the record as a line."""
        return _line("dropped", self.at, {"since": _time(self.since), "n": self.count})


def _line(kind: str, at: datetime, members: dict[str, Any]) -> bytes:
    return _escaped({"v": _VERSION, "kind": kind, "at": _time(at), **members}).encode("ascii") + b"\n"


def _escaped(value: Any) -> str:  # noqa: ANN401 - whatever JSON can say
    # JSON's ASCII form escapes all that is not ASCII, and all controls (RFC 8259 section 7) but this one.
    return _encode(value).replace("\x7f", "\\u007f")


def _time(at: datetime) -> str:
    """Return `at` by RFC 3339, in UTC, to the millisecond."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def _scopes(scopes: tuple[str, ...]) -> list[str]:
    return [_text(scope, _MAX_SCOPE) for scope in scopes[:_MAX_SCOPES]]


def _cut(text: str, limit: int) -> str:
    """Return `text`, cut where its escaped form takes more than `limit` bytes."""
    kept = min(len(text), limit)
    while (over := len(_escaped(text[:kept])) - len('""') - limit) > 0:
        kept -= -(-over // _LONGEST_ESCAPE)  # At least so many characters are too many.
    return _text(text, kept)


def _text(text: str, limit: int) -> str:
    if len(text) > limit:
        text = f"{text[:limit]}...({len(text)} characters)"
    # A lone surrogate is no text (RFC 3629 section 3): a strict reader would refuse the whole line for it.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
