"""Why a policy decides as it does, and what would have to change: for the people who run the broker.

None of this may reach the caller: it names grants, audiences and other workloads. A caller gets `Denial.reason`.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from carnet.claims import is_name
from carnet.durations import format_duration
from carnet.spiffe import SpiffeID
from carnet.verify import Binding
from carnet_broker.core.policy.model import Denial, DenialReason, Grant, Granted, Policy

__all__ = ["Explanation", "explain"]

_MAX_LISTED: Final = 5
_MAX_SHOWN: Final = 80


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision in words."""

    decision: Granted | Denial
    summary: str
    """What was decided, and by which rule."""
    hints: tuple[str, ...]
    """For a denial: what comes nearest, and what would have allowed it."""

    @property
    def allowed(self) -> bool:
        """Whether the request is granted."""
        return isinstance(self.decision, Granted)

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation for machines."""
        said = {"summary": self.summary, "hints": list(self.hints)}
        decided = self.decision
        if isinstance(decided, Denial):
            outside = list(decided.outside)
            return {"decision": "deny", "reason": str(decided.reason), "scopes_outside": outside, **said}
        return {
            "decision": "allow",
            "scopes": list(decided.scopes),
            "max_ttl": format_duration(decided.max_ttl),
            "binding": str(decided.binding),
            "may_act": decided.may_act,
            "rules": [{"file": grant.file, "line": grant.line, "grant": grant.position} for grant in decided.grants],
            **said,
        }


def explain(policy: Policy, workload: SpiffeID, audience: str, scopes: Iterable[str] = ()) -> Explanation:
    """Decide as `Policy.decide` does, and say why.

    It looks at every grant, so it takes a moment where there are many: it is for people, not for calls.
    """
    decision = policy.decide(workload, audience, scopes)
    if isinstance(decision, Granted):
        return Explanation(decision, _allowed(decision, workload, audience), ())
    if decision.reason is DenialReason.NOT_GRANTED:
        return _not_granted(policy, decision, workload, audience)
    return _scope_not_granted(policy, decision, workload, audience)


def _allowed(granted: Granted, workload: SpiffeID, audience: str) -> str:
    binding = "bound to the caller's certificate" if granted.binding is Binding.CERTIFICATE else "not bound"
    give = "gives" if len(granted.grants) == 1 else "together give"
    return (
        f"{granted.rule} {give} {workload} the scopes {', '.join(granted.scopes)} of {audience}, for at most"
        f" {format_duration(granted.max_ttl)}, {binding}"
    )


def _not_granted(policy: Policy, denial: Denial, workload: SpiffeID, audience: str) -> Explanation:
    if workload.trust_domain != policy.trust_domain:
        summary = f"{workload} is of another trust domain: {policy.file} is for {policy.trust_domain}"
        return Explanation(denial, summary, ("the broker refuses its certificate before it asks the policy",))
    if audience not in policy.audiences:
        summary = f"{policy.file} has no audience {_shown(audience)}"
        return Explanation(denial, summary, (_instead(audience, policy.audiences, "the audiences are"),))
    summary = f"no grant of {audience} names {workload}"
    return Explanation(denial, summary, tuple(_ways_in(policy, workload, audience)))


def _ways_in(policy: Policy, workload: SpiffeID, audience: str) -> Iterable[str]:
    grants = [grant for grant in policy.grants if grant.audience == audience]
    if grants:
        closest = _closest(grants, workload)
        yield f"the closest is {closest}, for {closest.workload}"
    else:
        yield f"no workload has a grant of {audience}"
    others = [name for name in policy.audiences if policy.grants_of(workload, name)]
    yield f"this workload has grants of {_listed(others)}" if others else "this workload has no grant at all"


def _closest(grants: Iterable[Grant], workload: SpiffeID) -> Grant:
    """Return the grant whose pattern has most in common with `workload`."""

    def likeness(grant: Grant) -> tuple[int, int, int]:
        wanted, given = grant.workload.segments, workload.segments
        same = [w in ("*", "**", g) for w, g in zip(wanted, given, strict=False)]
        leading = next((n for n, equal in enumerate(same) if not equal), len(same))
        return leading, sum(same), -abs(len(wanted) - len(given))

    def spelling(grant: Grant) -> float:
        return difflib.SequenceMatcher(None, str(grant.workload), str(workload)).ratio()

    # Comparing the spelling is slow, so only those are compared that are alike by segments.
    return max(heapq.nlargest(20, grants, key=likeness), key=lambda grant: (likeness(grant), spelling(grant)))


def _scope_not_granted(policy: Policy, denial: Denial, workload: SpiffeID, audience: str) -> Explanation:
    grants = policy.grants_of(workload, audience)
    summary = f"{workload} has a grant of {audience}, but not with {_listed(denial.outside)}"
    hints = [f"{grant} gives {_listed(sorted(grant.scopes))}" for grant in grants[:_MAX_LISTED]]
    section = policy.audiences[audience]
    for scope in denial.outside[:_MAX_LISTED]:
        if scope in section.scopes:
            hints.append(f"to allow {scope}, add it to the scopes of {grants[0]}")
        else:
            place = f"{policy.file}:{section.line}: audiences.{audience}"
            hints.append(f"{place} has no scope {_shown(scope)}; {_instead(scope, section.scopes, 'its scopes are')}")
    return Explanation(denial, summary, tuple(hints))


def _instead(name: str, known: Iterable[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name[:_MAX_SHOWN], known, n=1)
    return f"did you mean {close[0]}?" if close else f"{otherwise} {_listed(sorted(known))}"


def _listed(names: Iterable[str]) -> str:
    shown = [_shown(name) for name in names]
    more = len(shown) - _MAX_LISTED
    return ", ".join(shown[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _shown(name: str) -> str:
    """Return `name` so that it can be printed: what is asked for may be any text."""
    return name if is_name(name) else repr(name[:_MAX_SHOWN])
