"""The compiled policy, and its decision on whether a workload may call an audience with some scopes.

Rules:

1. The default is to refuse. What no grant gives is not given, whatever else the policy says.
2. A grant names workloads (one SPIFFE ID, or a pattern of the policy's own trust domain), one audience and scopes.
   Names are compared whole and as they are: no folding of case, no normalising.
3. One scope outside the grants refuses the whole request: a caller never gets a token that is silently narrower than
   what it asked for. No scope asked means all that the grants give. Scopes are a set: order and repetition say nothing.
4. Where several grants name the same workload and audience, they add up, scope by scope. A scope may live as long as
   the most generous grant that gives *that scope* says, and a token lives as long as its shortest scope. So another
   grant never takes a right away, and no scope ever lives longer than some line of the policy says. (The longest limit
   of all matching grants would let a long grant of one scope stretch another; the shortest would let a new grant break
   callers that do not use it; "the most specific grant wins" would do both.) The right to act for another adds up in
   the same way, from the grants with ``may_act`` alone.
5. A grant may shorten its audience's ``max_ttl`` and never exceed it. The binding belongs to the audience.

A decision costs one look-up for the grants that name the workload exactly, and one walk along the segments of its
SPIFFE ID for those with wildcards, however many grants there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from operator import attrgetter
from types import MappingProxyType
from typing import Final

from carnet.spiffe import SpiffeID, SpiffeIDPattern
from carnet.verify import Binding
from carnet_broker.core.policy.pattern_index import PatternIndex

__all__ = ["Admin", "Audience", "Denial", "DenialReason", "Grant", "Granted", "Policy", "PolicyTest"]


@dataclass(frozen=True, slots=True)
class Audience:
    """A service that tokens are for."""

    name: str
    scopes: frozenset[str]
    max_ttl: timedelta
    """The longest life of a token."""
    binding: Binding
    served_by: tuple[SpiffeIDPattern, ...]
    """Who may watch, introspect and exchange for this audience. Empty: nobody."""
    line: int


@dataclass(frozen=True, slots=True)
class Grant:
    """One grant of the policy. As text it is the place where it stands: ``policy.yaml:14: grants[0]``."""

    workload: SpiffeIDPattern
    audience: str
    scopes: frozenset[str]
    max_ttl: timedelta
    """The longest life of a token: the grant's own, or its audience's."""
    may_act: bool
    """Whether the workload may act for another towards the audience."""
    file: str
    position: int
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: grants[{self.position}]"


@dataclass(frozen=True, slots=True)
class Admin:
    """A workload that may use the admin port. The identity is the control; `networks` is defence in depth."""

    workload: SpiffeID
    networks: tuple[IPv4Network | IPv6Network, ...]
    """Where it may come from. Empty: from anywhere."""
    line: int


@dataclass(frozen=True, slots=True)
class PolicyTest:
    """What the policy itself says that it must decide."""

    workload: SpiffeID
    audience: str
    scopes: tuple[str, ...]
    allow: bool
    position: int
    line: int


class DenialReason(StrEnum):
    """Why a request is refused, as far as the caller may know."""

    NOT_GRANTED = "NOT_GRANTED"
    """No grant names this workload and audience; nor is it said whether there is such an audience."""
    SCOPE_NOT_GRANTED = "SCOPE_NOT_GRANTED"
    """There is a grant, and it does not give all the scopes that were asked for."""


@dataclass(frozen=True, slots=True)
class Denial:
    """The policy says no. A caller may be told the reason and nothing else."""

    reason: DenialReason
    outside: tuple[str, ...] = ()
    """The scopes that no grant gives, sorted. They come from the caller, and may be any text."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The policy says yes."""

    scopes: tuple[str, ...]
    """What the token may carry, sorted: the scopes asked for, or all that the grants give."""
    max_ttl: timedelta
    binding: Binding
    grants: tuple[Grant, ...]
    """The grants that gave the scopes, in the order of the file."""
    acting_max_ttl: timedelta | None
    """The longest life of a token with these scopes when the workload acts for another. None: it may not."""

    @property
    def may_act(self) -> bool:
        """Whether the workload may act for another with all these scopes."""
        return self.acting_max_ttl is not None

    @property
    def rule(self) -> str:
        """Which grants decided, with file and line."""
        return ", ".join(map(str, self.grants))


_POSITION: Final = attrgetter("position")
_NOT_GRANTED: Final = Denial(DenialReason.NOT_GRANTED)


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy as a whole, compiled from one text. Nothing in it changes."""

    file: str
    version: str
    """The beginning of the SHA-256 of the text: names the policy in the ledger and in logs."""
    issuer: str
    trust_domain: str
    audiences: Mapping[str, Audience] = field(repr=False)
    grants: tuple[Grant, ...] = field(repr=False)
    admins: tuple[Admin, ...] = field(repr=False)
    tests: tuple[PolicyTest, ...] = field(repr=False)
    _indexes: dict[str, PatternIndex[Grant]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "audiences", MappingProxyType(dict(self.audiences)))
        object.__setattr__(self, "_indexes", {name: PatternIndex() for name in self.audiences})
        for grant in self.grants:
            self._indexes[grant.audience].add(grant.workload, grant)

    def grants_of(self, workload: SpiffeID, audience: str) -> list[Grant]:
        """Return the grants that name `workload` and `audience`, in the order of the file."""
        index = self._indexes.get(audience)
        if index is None or workload.trust_domain != self.trust_domain:
            return []
        return sorted(index.find(workload), key=_POSITION)

    def decide(self, workload: SpiffeID, audience: str, scopes: Iterable[str] = ()) -> Granted | Denial:
        """Decide whether `workload` may have a token for `audience` with `scopes` (none: all that it may have)."""
        grants = self.grants_of(workload, audience)
        if not grants:
            return _NOT_GRANTED
        wanted = sorted(set(scopes) or {scope for grant in grants for scope in grant.scopes})
        givers = _most_generous(grants, wanted)
        if len(givers) < len(wanted):
            return Denial(DenialReason.SCOPE_NOT_GRANTED, tuple(scope for scope in wanted if scope not in givers))
        acting = _most_generous([grant for grant in grants if grant.may_act], wanted)
        positions = {grant.position for grant in givers.values()}
        return Granted(
            scopes=tuple(wanted),
            max_ttl=_shortest(givers),
            binding=self.audiences[audience].binding,
            grants=tuple(grant for grant in grants if grant.position in positions),
            acting_max_ttl=_shortest(acting) if len(acting) == len(wanted) else None,
        )


def _most_generous(grants: list[Grant], scopes: list[str]) -> dict[str, Grant]:
    """Return, for each of `scopes` that `grants` give, the first of them with the longest life."""
    givers: dict[str, Grant] = {}
    for grant in grants:
        for scope in scopes:
            if scope in grant.scopes and (scope not in givers or givers[scope].max_ttl < grant.max_ttl):
                givers[scope] = grant
    return givers


def _shortest(givers: dict[str, Grant]) -> timedelta:
    return min([grant.max_ttl for grant in givers.values()])
