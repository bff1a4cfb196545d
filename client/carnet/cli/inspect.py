"""``carnet inspect``: what a token says, with nothing of it believed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

from carnet.cli.parameters import read_token
from carnet.durations import format_duration

__all__ = ["inspect"]

_WARNING: Final = "UNVERIFIED: nobody checked the signature, and anybody can write such a text ('carnet verify' checks)"
_SHOWN: Final = 200
_LAST_SECOND: Final = 253_402_300_799

_MEANINGS: Final = {
    "alg": "the signature algorithm; a verifier takes ES256 only",
    "typ": "the kind of token; a verifier takes at+jwt only (RFC 9068)",
    "kid": "the key that signed it, by its thumbprint (RFC 7638)",
    "iss": "the issuer: one for each environment",
    "sub": "the workload that the token speaks for",
    "aud": "the one service that the token is for",
    "client_id": "the workload that asked for it",
    "exp": "the end of the token",
    "iat": "when it was issued",
    "nbf": "from when on it is valid",
    "jti": "the name of the token, in logs and revocations",
    "scope": "what it allows at the audience",
    "cnf": "works only together with the client certificate of this thumbprint (RFC 8705)",
    "rv": "the revocation version that the issuer had applied",
}
_TIMES: Final = frozenset({"exp", "iat", "nbf"})
_UNKNOWN: Final = "not a member of a Carnet token: a verifier refuses it"


@dataclass(frozen=True, slots=True)
class _Reading:
    """What could be read of a text that should be a token."""

    header: dict[str, Any]
    claims: dict[str, Any]
    problem: str | None
    """Why a verifier would refuse its form, None where it would not."""


@click.command()
@click.argument("token")
@click.option("--json", "as_json", is_flag=True, help="Print an object with header, claims and what is wrong in form.")
def inspect(token: str, *, as_json: bool) -> int:
    """Explain each claim of TOKEN, without verifying it.

    TOKEN - reads from standard input. Exit code 0: it has the form of a Carnet token, which says nothing about who made
    it; 1: it has not, every verifier would refuse it; 2: it is no token at all.
    """
    reading, now = _read(read_token(token)), datetime.now(UTC)
    if as_json:
        shown = {
            "verified": False,
            "header": reading.header,
            "claims": reading.claims,
            "well_formed": reading.problem is None,
            "problem": reading.problem,
        }
        click.echo(json.dumps(shown))
    else:
        click.echo(
            "\n".join([_WARNING, *_table("header", reading.header, now), *_table("claims", reading.claims, now)])
        )
        if reading.problem is not None:
            click.echo(f"\na verifier would refuse it: {reading.problem}")
    return 0 if reading.problem is None else 1


def _read(token: str) -> _Reading:
    from carnet.claims import claims_of_payload  # noqa: PLC0415 - see carnet.cli
    from carnet.errors import InvalidTokenError  # noqa: PLC0415
    from carnet.verify import parse_unverified  # noqa: PLC0415

    header, claims, problem = *_decode(token), None
    try:
        claims_of_payload(parse_unverified(token).unverified_payload)
    except InvalidTokenError as error:
        problem = str(error)
    return _Reading(header, claims, problem)


def _decode(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return header and claims, read as leniently as anybody might: also of what a verifier would refuse."""
    from base64 import urlsafe_b64decode  # noqa: PLC0415 - see carnet.cli

    parts = token.split(".")
    try:
        header, claims = (json.loads(urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in parts[:2])
    except (ValueError, RecursionError):
        header = claims = None
    if not isinstance(header, dict) or not isinstance(claims, dict):
        msg = (
            "this is no token: a token is three parts of base64url divided by dots, and the first two are JSON objects"
        )
        raise click.ClickException(msg)
    return header, claims


def _table(title: str, members: Mapping[str, Any], now: datetime) -> Iterator[str]:
    yield f"\n{title}"
    for name, value in members.items():
        # As JSON in ASCII: no text of a token gets at the terminal as it is.
        shown = json.dumps(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}... ({len(shown)} signs)"
        yield f"  {json.dumps(name)[1:-1][:40]:<10} {shown}"
        yield f"  {'':<10} {_MEANINGS.get(name, _UNKNOWN)}{_time(value, now) if name in _TIMES else ''}"


def _time(value: object, now: datetime) -> str:
    if type(value) is not int or not 0 <= value <= _LAST_SECOND:
        return ""
    then = datetime.fromtimestamp(value, UTC)
    distance = format_duration(abs(timedelta(seconds=int((then - now).total_seconds()))))
    return f": {then:%Y-%m-%dT%H:%M:%SZ}, " + (f"in {distance}" if then > now else f"{distance} ago")
