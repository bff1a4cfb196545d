"""The policy as a file: its shape, and the form of each name in it. What the names mean together is in `load`.

Forms:

- An audience is 1 to 255 letters, digits and ``. _ : / @ -``, beginning and ending with a letter or a digit: host
  names, URLs and plain words, and nothing that looks like a pattern or compares differently elsewhere.
- Scopes are RFC 6749 scope-tokens (section 3.3) of at most 128 signs.
- The issuer is an https URL with no query and no fragment (RFC 8414 section 2), and no slash at its end: two spellings
  of one issuer would be two issuers.
- A list that would be empty is left out. ``grants: []`` alone may be written: it grants nothing, which is clear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Final, Literal, TypeAlias, TypeVar

import pydantic

from carnet.claims import MAX_NAME_LENGTH, MAX_SCOPE_LENGTH, MAX_SCOPES, is_name, is_scope_token
from carnet.errors import InvalidIdentityError
from carnet.spiffe import SpiffeID, SpiffeIDPattern
from carnet.verify import Binding
from carnet_broker.core.marked_yaml import (
    DocumentError,
    Duration,
    MarkedDocument,
    Section,
    between,
    read_yaml,
    validate,
)

__all__ = ["PolicyDocument", "PolicyError", "read_document"]

_MAX_BYTES: Final = 32 * 1024 * 1024
"""Over 300,000 grants."""
_MAX_SCOPE_TEXT: Final = 2048
"""All scopes of an audience, divided by spaces: what fits into a token beside long names."""
_AUDIENCE: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:/@-]*[A-Za-z0-9])?")
_ISSUER: Final = re.compile(r"https://[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::[1-9][0-9]{0,4})?(?:/[A-Za-z0-9._~-]+)*")

_Value = TypeVar("_Value")
_Parsed = TypeVar("_Parsed")


class PolicyError(DocumentError):
    """A policy cannot be used; the one that was loaded before stays."""


def _text(value: object) -> str:
    if not isinstance(value, str):
        msg = "this must be text (in quotes where it looks like a number); correct it"
        raise ValueError(msg)  # noqa: TRY004 - pydantic collects ValueError only.
    return value


def _identity(parse: Callable[[str], _Parsed], remedy: str) -> Callable[[object], _Parsed]:
    def read(value: object) -> _Parsed:
        try:
            return parse(_text(value))
        except InvalidIdentityError as error:
            msg = f"{error}; {remedy}"
            raise ValueError(msg) from None

    return read


def _network(value: object) -> IPv4Network | IPv6Network:
    text = _text(value)
    try:
        return ip_network(text)
    except ValueError:
        pass
    try:
        hint = f"; did you mean {ip_network(text, strict=False)}?"
    except ValueError:
        hint = ", for instance 127.0.0.0/8 or ::1/128"
    msg = f"{text[:80]!r} is not a network; write an address and a prefix length with all bits after it zero{hint}"
    raise ValueError(msg)


def _audience(text: str) -> str:
    if len(text) > MAX_NAME_LENGTH or not _AUDIENCE.fullmatch(text):
        msg = (
            f"{text[:80]!r} is not an audience; write at most {MAX_NAME_LENGTH} letters, digits and . _ : / @ -"
            " that begin and end with a letter or a digit"
        )
        raise ValueError(msg)
    return text


def _scope(text: str) -> str:
    if not is_scope_token(text):
        msg = (
            f"{text[:80]!r} is not a scope-token (RFC 6749 section 3.3); write 1 to {MAX_SCOPE_LENGTH} printable ASCII"
            " signs without space, quote and backslash"
        )
        raise ValueError(msg)
    return text


def _issuer(text: str) -> str:
    if not (is_name(text) and _ISSUER.fullmatch(text)):
        msg = (
            f"{text[:80]!r} is not an issuer; write one https URL for the environment, in lower case up to the path,"
            " with no user, query, fragment or slash at the end"
        )
        raise ValueError(msg)
    return text


def _trust_domain(text: str) -> str:
    try:
        whole = SpiffeID.parse(f"spiffe://{text}/x").trust_domain == text  # And not only up to a slash in it.
    except InvalidIdentityError:
        whole = False
    if not whole:
        msg = f"{text[:80]!r} is not a trust domain; write its name alone, for instance prod.example"
        raise ValueError(msg)
    return text


def _once(values: tuple[_Value, ...]) -> tuple[_Value, ...]:
    seen: set[Hashable] = set()
    for value in values:
        if value in seen:
            msg = f"{str(value)[:80]} is listed twice; remove one"
            raise ValueError(msg)
        seen.add(value)
    return values


def _fits(scopes: tuple[str, ...]) -> tuple[str, ...]:
    length = len(" ".join(scopes))
    if len(scopes) > MAX_SCOPES or length > _MAX_SCOPE_TEXT:
        msg = (
            f"{len(scopes)} scopes of {length} signs together do not fit into a token; give at most {MAX_SCOPES} scopes"
            f" of {_MAX_SCOPE_TEXT} signs, or divide the audience"
        )
        raise ValueError(msg)
    return scopes


_NotEmpty: Final = pydantic.Field(min_length=1)
_Pattern: TypeAlias = Annotated[
    SpiffeIDPattern,
    pydantic.PlainValidator(_identity(SpiffeIDPattern.parse, "write for instance spiffe://prod.example/ns/shop/sa/*")),
]
_Workload: TypeAlias = Annotated[
    SpiffeID,
    pydantic.PlainValidator(
        _identity(SpiffeID.parse, "write the whole name of one workload, for instance spiffe://prod.example/ns/a/sa/b")
    ),
]
_Audience: TypeAlias = Annotated[str, pydantic.AfterValidator(_audience)]
_Scope: TypeAlias = Annotated[str, pydantic.AfterValidator(_scope)]
_Scopes: TypeAlias = Annotated[tuple[_Scope, ...], _NotEmpty, pydantic.AfterValidator(_once)]
_Network: TypeAlias = Annotated[IPv4Network | IPv6Network, pydantic.PlainValidator(_network)]
# A claim is in whole seconds, so nothing shorter than one can be said in a token.
_Life: TypeAlias = Annotated[Duration, between(timedelta(seconds=1), timedelta(hours=24))]


class AudienceSection(Section):
    """``audiences.NAME``."""

    scopes: Annotated[_Scopes, pydantic.AfterValidator(_fits)]
    max_ttl: _Life = timedelta(minutes=5)
    binding: Binding = Binding.CERTIFICATE
    served_by: Annotated[tuple[_Pattern, ...], _NotEmpty, pydantic.AfterValidator(_once)] = ()


class GrantSection(Section):
    """``grants[N]``."""

    workload: _Pattern
    audience: _Audience
    scopes: _Scopes
    max_ttl: _Life | None = None
    may_act: bool = False


class AdminSection(Section):
    """``admins[N]``."""

    workload: _Workload
    networks: Annotated[tuple[_Network, ...], _NotEmpty, pydantic.AfterValidator(_once)] = pydantic.Field(
        default=(), alias="from"
    )


class ExampleSection(Section):
    """``tests[N]``."""

    workload: _Workload
    audience: _Audience
    scopes: _Scopes = ()
    expect: Literal["allow", "deny"]


class PolicyDocument(Section):
    """A whole policy file."""

    issuer: Annotated[str, pydantic.AfterValidator(_issuer)]
    trust_domain: Annotated[str, pydantic.AfterValidator(_trust_domain)]
    audiences: Annotated[dict[_Audience, AudienceSection], _NotEmpty]
    grants: tuple[GrantSection, ...]
    admins: tuple[AdminSection, ...] = ()
    tests: tuple[ExampleSection, ...] = ()


def read_document(text: str | bytes, name: str) -> tuple[PolicyDocument, MarkedDocument]:
    """Return the policy that `text` (YAML, UTF-8) is, and its lines; `name` is the file's name in messages.

    Raises `PolicyError` with all that is wrong with its form.
    """
    try:
        marked = read_yaml(text, name, max_bytes=_MAX_BYTES)
        return validate(PolicyDocument, marked), marked
    except DocumentError as error:
        raise PolicyError(name, error.problems) from None
