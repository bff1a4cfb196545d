"""Who may call a method: one rule for each method, and nobody where there is none."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from carnet.claims import is_scope_token
from carnet.errors import ConfigError
from carnet.keysets import OnStale

__all__ = ["Rule", "allow_any_scope", "allow_unauthenticated", "parse_rules", "require"]

_METHOD: Final = re.compile(r"/[^/\s]+/[^/\s]+")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a method asks of its callers. Made by `require`, `allow_any_scope` and `allow_unauthenticated`."""

    scopes: frozenset[str]
    """All of them must be in the token."""
    token: bool
    """Whether a token is asked for at all."""
    on_stale: OnStale | None = None
    """What to do when keys and revocations are too old to decide with; None leaves it to the verifier."""


def require(*, scopes: Collection[str], on_stale: OnStale | str | None = None) -> Rule:
    """Return the rule that the caller's token must hold all of `scopes`. Raises `ConfigError` for none, or no scope.

    `on_stale`: ``"accept"`` goes on with keys and revocations that are too old, ``"refuse"`` does not; by default the
    verifier decides.
    """
    if isinstance(scopes, str) or not scopes:  # A text is a collection too, of its letters.
        msg = "require(scopes=...) needs a list of at least one scope; where any will do, say allow_any_scope()"
        raise ConfigError(msg)
    for scope in scopes:
        if not is_scope_token(scope):
            msg = f"{scope!r} is not a scope: 1 to 128 printable ASCII signs without space, quote and backslash"
            raise ConfigError(msg)
    return Rule(frozenset(scopes), token=True, on_stale=_parsed(on_stale))


def allow_any_scope(*, on_stale: OnStale | str | None = None) -> Rule:
    """Return the rule that any good token for this service will do. `on_stale` as in `require`."""
    return Rule(frozenset(), token=True, on_stale=_parsed(on_stale))


def allow_unauthenticated() -> Rule:
    """Return the rule that no token is asked for, and none is looked at. For health checks, by explicit choice."""
    return Rule(frozenset(), token=False)


def parse_rules(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Return a copy of `rules`. Raises `ConfigError` for a name that is no method, which nothing would ever match."""
    for method in rules:
        if not _METHOD.fullmatch(method):
            msg = f"{method!r} is not a method: write it as /package.Service/Method"
            raise ConfigError(msg)
    return dict(rules)


def _parsed(on_stale: OnStale | str | None) -> OnStale | None:
    try:
        return None if on_stale is None else OnStale(on_stale)
    except ValueError:
        msg = f"on_stale is {str(on_stale)[:40]!r}: give 'refuse' or 'accept'"
        raise ConfigError(msg) from None
