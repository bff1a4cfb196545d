"""The policy's decisions against a slow and obvious one, for policies and requests of every kind."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from carnet.spiffe import SpiffeID, SpiffeIDPattern
from carnet.verify import Binding
from carnet_broker.core.policy import Audience, Denial, DenialReason, Grant, Granted, Policy, PolicyError, load_policy
from support.policies import CRON, ORDERS, OUTSIDER, PAYMENTS, POLICY

SCOPES = ("read", "write", "delete")
AUDIENCES = ("bank", "payments")
TRUST_DOMAIN = "prod.example"

# A busy machine is slow, and that is not what is tested here.
unhurried = settings(deadline=None)

# Few names and short paths, so that most requests meet several grants.
segments = st.sampled_from(("a", "b"))
paths = st.lists(segments, min_size=1, max_size=3)
patterns = st.tuples(
    st.lists(segments | st.just("*"), max_size=2),
    st.lists(segments | st.sampled_from(("*", "**")), min_size=1, max_size=1),
).map(lambda parts: SpiffeIDPattern.parse(f"spiffe://{TRUST_DOMAIN}/{'/'.join(parts[0] + parts[1])}"))
workloads = paths.map(lambda path: SpiffeID.parse(f"spiffe://{TRUST_DOMAIN}/{'/'.join(path)}"))
lives = st.integers(1, 5).map(lambda minutes: timedelta(minutes=minutes))
asked = st.lists(st.sampled_from(SCOPES), max_size=4)


@st.composite
def grants(draw: st.DrawFn) -> tuple[Grant, ...]:
    """Some grants, many of which overlap."""
    count = draw(st.integers(0, 8))
    return tuple(
        Grant(
            workload=draw(patterns),
            audience=draw(st.sampled_from(AUDIENCES)),
            scopes=frozenset(draw(st.sets(st.sampled_from(SCOPES), min_size=1))),
            max_ttl=draw(lives),
            may_act=draw(st.booleans()),
            file="policy.yaml",
            position=position,
            line=position + 1,
        )
        for position in range(count)
    )


def policy_of(given_grants: tuple[Grant, ...]) -> Policy:
    """A policy with these grants."""
    audiences = {
        name: Audience(name, frozenset(SCOPES), timedelta(minutes=5), Binding.CERTIFICATE, (), 1) for name in AUDIENCES
    }
    return Policy("policy.yaml", "v1", "https://a.example", TRUST_DOMAIN, audiences, given_grants, (), ())


def slow_decision(
    policy: Policy, workload: SpiffeID, audience: str, scopes: list[str]
) -> tuple[tuple[str, ...], timedelta, timedelta | None] | Denial:
    """What the rules say, one grant after the other: scopes, longest life, longest life when acting for another."""
    matching = [g for g in policy.grants if g.audience == audience and g.workload.matches(workload)]
    if not matching:
        return Denial(DenialReason.NOT_GRANTED)
    wanted = sorted(set(scopes) or {scope for grant in matching for scope in grant.scopes})
    outside = tuple(scope for scope in wanted if not any(scope in grant.scopes for grant in matching))
    if outside:
        return Denial(DenialReason.SCOPE_NOT_GRANTED, outside)
    longest = [max(g.max_ttl for g in matching if scope in g.scopes) for scope in wanted]
    acting = [[g.max_ttl for g in matching if scope in g.scopes and g.may_act] for scope in wanted]
    return tuple(wanted), min(longest), min(map(max, acting)) if all(acting) else None


@unhurried
@given(grants(), workloads, st.sampled_from((*AUDIENCES, "none")), asked)
def test_the_index_decides_as_reading_every_grant_would(
    some: tuple[Grant, ...], workload: SpiffeID, audience: str, scopes: list[str]
) -> None:
    """For any grants and any request: same answer, same scopes, same lives."""
    policy = policy_of(some)
    decision = policy.decide(workload, audience, scopes)
    if isinstance(decision, Granted):
        found: object = (decision.scopes, decision.max_ttl, decision.acting_max_ttl)
    else:
        found = decision
    assert slow_decision(policy, workload, audience, scopes) == found


@unhurried
@given(grants(), workloads, st.sampled_from(AUDIENCES), asked)
def test_b01_what_is_granted_is_what_was_asked_and_some_grant_gives(
    some: tuple[Grant, ...], workload: SpiffeID, audience: str, scopes: list[str]
) -> None:
    """Never fewer scopes than asked, never one that no named grant gives, and none that outlives its grants."""
    decision = policy_of(some).decide(workload, audience, scopes)
    if isinstance(decision, Denial):
        return
    assert not scopes or tuple(sorted(set(scopes))) == decision.scopes
    for scope in decision.scopes:
        assert any(scope in grant.scopes and decision.max_ttl <= grant.max_ttl for grant in decision.grants)
    assert all(grant.workload.matches(workload) and grant.audience == audience for grant in decision.grants)
    assert decision.acting_max_ttl is None or decision.acting_max_ttl <= decision.max_ttl


@unhurried
@given(grants(), paths, st.sampled_from(AUDIENCES), st.sampled_from(("staging.example", "prod.example.x", "x")))
def test_b02_no_pattern_matches_another_trust_domain(
    some: tuple[Grant, ...], path: list[str], audience: str, domain: str
) -> None:
    """Whatever the grants say, a workload from elsewhere has none."""
    everything = Grant(
        SpiffeIDPattern.parse(f"spiffe://{TRUST_DOMAIN}/**"),
        audience,
        frozenset(SCOPES),
        timedelta(minutes=1),
        may_act=True,
        file="policy.yaml",
        position=len(some),
        line=1,
    )
    policy = policy_of((*some, everything))
    assert isinstance(policy.decide(SpiffeID(TRUST_DOMAIN, tuple(path)), audience), Granted)
    assert Denial(DenialReason.NOT_GRANTED) == policy.decide(SpiffeID(domain, tuple(path)), audience)


@unhurried
@given(grants(), grants(), workloads, st.sampled_from(AUDIENCES), asked)
def test_more_grants_never_take_a_right_away(
    some: tuple[Grant, ...], more: tuple[Grant, ...], workload: SpiffeID, audience: str, scopes: list[str]
) -> None:
    """What was granted stays granted, for at least as long, and acting for another too."""
    before = policy_of(some).decide(workload, audience, scopes)
    if isinstance(before, Denial):
        return
    added = tuple(
        Grant(g.workload, g.audience, g.scopes, g.max_ttl, g.may_act, g.file, g.position + len(some), g.line)
        for g in more
    )
    after = policy_of(some + added).decide(workload, audience, before.scopes)
    assert isinstance(after, Granted)
    assert before.max_ttl <= after.max_ttl
    assert before.acting_max_ttl is None or (after.acting_max_ttl or timedelta(0)) >= before.acting_max_ttl
    everything = policy_of(some + added).decide(workload, audience)
    assert isinstance(everything, Granted)
    assert set(before.scopes) <= set(everything.scopes)


@unhurried
@given(grants(), workloads, st.text(max_size=30), st.lists(st.text(max_size=30), max_size=5))
def test_b01_b02_any_text_is_decided_and_only_exact_names_are_granted(
    some: tuple[Grant, ...], workload: SpiffeID, audience: str, scopes: list[str]
) -> None:
    """No request makes the decision fail, and none that is not spelled like the policy gets anything."""
    policy = policy_of(some)
    decision = policy.decide(workload, audience, scopes)
    assert audience in AUDIENCES or Denial(DenialReason.NOT_GRANTED) == decision
    if scopes and not set(scopes) <= set(SCOPES):
        assert all(isinstance(policy.decide(workload, name, scopes), Denial) for name in AUDIENCES)


def allowed(policy: Policy) -> set[tuple[SpiffeID, str, str]]:
    """Everything that the shared policy's workloads may do."""
    return {
        (workload, audience, scope)
        for workload in (ORDERS, PAYMENTS, CRON, OUTSIDER)
        for audience in policy.audiences
        for scope in policy.audiences[audience].scopes
        if isinstance(policy.decide(workload, audience, [scope]), Granted)
    }


WHOLE = allowed(load_policy(POLICY, "policy.yaml"))


@unhurried
@given(st.integers(0, len(POLICY)))
def test_b12_a_file_that_was_cut_off_never_allows_more(length: int) -> None:
    """A partial write is refused, or gives a part of what the whole gives; never all."""
    try:
        policy = load_policy(POLICY[:length], "policy.yaml")
    except PolicyError:
        return
    assert allowed(policy) <= WHOLE


@unhurried
@given(st.integers(0, len(POLICY)), st.integers(0, 40), st.text(max_size=12))
@example(0, 0, "\ufeff")
def test_b12_a_damaged_file_is_a_policy_error_or_a_policy(start: int, removed: int, inserted: str) -> None:
    """Nothing else leaves the loader, and every problem is one line that names a line of the file."""
    text = POLICY[:start] + inserted + POLICY[start + removed :]
    try:
        load_policy(text, "policy.yaml")
    except PolicyError as error:
        for line in error.lines:
            assert line.isprintable()
            assert 1 <= int(line.split(":")[1]) <= text.count("\n") + 1


@unhurried
@given(st.binary(max_size=200))
def test_b12_any_bytes_are_a_policy_error(raw: bytes) -> None:
    """Rubbish is refused, never a crash and never a policy."""
    with pytest.raises(PolicyError):
        load_policy(raw, "policy.yaml")
