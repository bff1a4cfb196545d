"""From the text of a policy to a `Policy`: the names in it fit together, and its own tests pass."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from carnet.durations import format_duration
from carnet.spiffe import SpiffeID, SpiffeIDPattern
from carnet_broker.core.marked_yaml import MarkedDocument, Path, Problem
from carnet_broker.core.policy.document import PolicyDocument, PolicyError, read_document
from carnet_broker.core.policy.explain import Explanation, explain
from carnet_broker.core.policy.model import Admin, Audience, Denial, Grant, Granted, Policy, PolicyTest

__all__ = ["PolicyTestError", "PolicyTestResult", "compile_policy", "load_policy", "run_tests"]

_VERSION_LENGTH: Final = 16


class PolicyTestError(PolicyError):
    """A policy does not decide as its own tests say that it must."""


@dataclass(frozen=True, slots=True)
class PolicyTestResult:
    """What a policy decided for one of its own tests."""

    policy: Policy = field(repr=False)
    test: PolicyTest
    decision: Granted | Denial

    @property
    def passed(self) -> bool:
        """Whether it decided as the test expects."""
        return self.test.allow == isinstance(self.decision, Granted)

    def explain(self) -> Explanation:
        """Say why it decided so. This takes longer than the test did."""
        return explain(self.policy, self.test.workload, self.test.audience, self.test.scopes)

    def __str__(self) -> str:
        explanation = self.explain()
        expected = "allow" if self.test.allow else "deny"
        found = "allowed" if explanation.allowed else "denied"
        return f"expected {expected}, and {found}: {'; '.join((explanation.summary, *explanation.hints))}"

    @property
    def problem(self) -> Problem:
        """What is wrong where the test did not pass."""
        text = f"{self}; correct the policy, or the test if it is the one that is wrong"
        return Problem(self.test.line, f"tests[{self.test.position}]", text)


def load_policy(text: str | bytes, name: str) -> Policy:
    """Return the policy that `text` (YAML, UTF-8) is, ready to decide; `name` is the file's name in messages.

    Raises `PolicyError` where its form is wrong or names in it do not fit together, and `PolicyTestError` where all
    that is right and one of its own tests fails. Each holds all problems of its kind.
    """
    policy = compile_policy(text, name)
    failed = [result.problem for result in run_tests(policy) if not result.passed]
    if failed:
        raise PolicyTestError(name, failed)
    return policy


def run_tests(policy: Policy) -> tuple[PolicyTestResult, ...]:
    """Run the tests that `policy` carries, in the order of the file."""
    return tuple(
        PolicyTestResult(policy, test, policy.decide(test.workload, test.audience, test.scopes))
        for test in policy.tests
    )


def compile_policy(text: str | bytes, name: str) -> Policy:
    """Do what `load_policy` does, without running the policy's own tests.

    Raises `PolicyError`.
    """
    document, marked = read_document(text, name)
    problems = list(_Checks(document, marked).problems())
    if problems:
        raise PolicyError(name, problems)
    raw = text.encode() if isinstance(text, str) else text
    return Policy(
        file=name,
        version=hashlib.sha256(raw).hexdigest()[:_VERSION_LENGTH],
        issuer=document.issuer,
        trust_domain=document.trust_domain,
        audiences={
            audience: Audience(
                name=audience,
                scopes=frozenset(section.scopes),
                max_ttl=section.max_ttl,
                binding=section.binding,
                served_by=section.served_by,
                line=marked.line_of(("audiences", audience)),
            )
            for audience, section in document.audiences.items()
        },
        grants=tuple(_grants(document, marked)),
        admins=tuple(
            Admin(admin.workload, admin.networks, marked.line_of(("admins", position)))
            for position, admin in enumerate(document.admins)
        ),
        tests=tuple(
            PolicyTest(
                workload=test.workload,
                audience=test.audience,
                scopes=test.scopes,
                allow=test.expect == "allow",
                position=position,
                line=marked.line_of(("tests", position)),
            )
            for position, test in enumerate(document.tests)
        ),
    )


def _grants(document: PolicyDocument, marked: MarkedDocument) -> Iterator[Grant]:
    shared: dict[frozenset[str], frozenset[str]] = {}  # Many grants give the same few sets of scopes.
    for position, grant in enumerate(document.grants):
        scopes = frozenset(grant.scopes)
        yield Grant(
            workload=grant.workload,
            audience=grant.audience,
            scopes=shared.setdefault(scopes, scopes),
            max_ttl=grant.max_ttl or document.audiences[grant.audience].max_ttl,
            may_act=grant.may_act,
            file=marked.name,
            position=position,
            line=marked.line_of(("grants", position)),
        )


@dataclass(frozen=True, slots=True)
class _Checks:
    """What the form of each part cannot say: whether the parts fit together."""

    document: PolicyDocument
    marked: MarkedDocument

    def problems(self) -> Iterator[Problem]:
        for name, audience in self.document.audiences.items():
            for position, pattern in enumerate(audience.served_by):
                yield from self._trust_domain(("audiences", name, "served_by", position), pattern)
        yield from self._of_grants()
        yield from self._of_admins()
        for position, test in enumerate(self.document.tests):
            # A test that asks for what does not exist would pass whatever the grants say, and hide a slip of the pen.
            at: Path = ("tests", position)
            yield from self._trust_domain((*at, "workload"), test.workload)
            yield from self._names(at, test.audience, test.scopes)

    def _of_grants(self) -> Iterator[Problem]:
        first: dict[tuple[SpiffeIDPattern, str, str], int] = {}
        for position, grant in enumerate(self.document.grants):
            at: Path = ("grants", position)
            yield from self._trust_domain((*at, "workload"), grant.workload)
            yield from self._names(at, grant.audience, grant.scopes)
            audience = self.document.audiences.get(grant.audience)
            if audience and grant.max_ttl and grant.max_ttl > audience.max_ttl:
                limit = format_duration(audience.max_ttl)
                yield self.marked.problem(
                    (*at, "max_ttl"), f"this is longer than the {limit} of its audience; a grant can only shorten it"
                )
            for index, scope in enumerate(grant.scopes):
                earlier = first.setdefault((grant.workload, grant.audience, scope), position)
                if earlier != position:
                    where = f"grants[{earlier}] on line {self.marked.line_of(('grants', earlier))}"
                    yield self.marked.problem(
                        (*at, "scopes", index), f"{where} gives the same workload {scope} already; remove one"
                    )

    def _of_admins(self) -> Iterator[Problem]:
        first: dict[SpiffeID, int] = {}
        for position, admin in enumerate(self.document.admins):
            at: Path = ("admins", position, "workload")
            yield from self._trust_domain(at, admin.workload)
            earlier = first.setdefault(admin.workload, position)
            if earlier != position:
                line = self.marked.line_of(("admins", earlier))
                yield self.marked.problem(
                    at, f"admins[{earlier}] on line {line} is the same workload; put them together"
                )

    def _trust_domain(self, at: Path, name: SpiffeID | SpiffeIDPattern) -> Iterator[Problem]:
        ours = self.document.trust_domain
        if name.trust_domain != ours:
            yield self.marked.problem(
                at, f"{name.trust_domain} is not the trust domain of this policy; name a workload of {ours}"
            )

    def _names(self, at: Path, name: str, scopes: Sequence[str]) -> Iterator[Problem]:
        audience = self.document.audiences.get(name)
        if audience is None:
            yield self.marked.problem(
                (*at, "audience"), f"there is no audience {name}; {_choice(name, self.document.audiences)}"
            )
            return
        for index, scope in enumerate(scopes):
            if scope not in audience.scopes:
                yield self.marked.problem(
                    (*at, "scopes", index), f"{name} has no scope {scope}; {_choice(scope, audience.scopes)}"
                )


def _choice(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else "add it to the audiences, or remove it here"
