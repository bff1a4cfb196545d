"""What a policy decides: exactly what its grants give, and nothing else."""

from __future__ import annotations

import dataclasses
import timeit
from datetime import timedelta

import pytest

from carnet.spiffe import SpiffeID
from carnet.verify import Binding
from carnet_broker.core.policy import Denial, DenialReason, Policy, load_policy
from support.counts import count
from support.policies import CRON, ORDERS, OUTSIDER, PAYMENTS, changed, granted, policy

NOT_GRANTED = Denial(DenialReason.NOT_GRANTED)


def test_a_grant_gives_its_scopes_with_the_limits_of_its_audience() -> None:
    """The scopes asked for, the longest life, the binding, and the line that decided."""
    given = granted(policy().decide(ORDERS, "payments", ["charge"]))
    assert (("charge",), timedelta(minutes=10), Binding.CERTIFICATE) == (given.scopes, given.max_ttl, given.binding)
    assert "policy.yaml:15: grants[0]" == given.rule
    assert not given.may_act


def test_no_scope_asked_gives_all_that_the_grants_give() -> None:
    """Sorted, and from every grant that matches; the answer names them."""
    given = granted(policy().decide(ORDERS, "payments"))
    assert ("charge", "report") == given.scopes
    assert "policy.yaml:15: grants[0], policy.yaml:16: grants[1]" == given.rule


def test_an_audience_may_ask_for_no_binding() -> None:
    """And its tokens are as short as the default says, where it says nothing else."""
    given = granted(policy().decide(PAYMENTS, "bank"))
    assert (Binding.NONE, timedelta(minutes=5), True) == (given.binding, given.max_ttl, given.may_act)


@pytest.mark.parametrize(
    "scopes",
    [
        *(["refund"], ["charge", "refund"], ["*"], ["charge "], [" charge"], ["Charge"], ["CHARGE"], ["charge\n"]),
        *(["charge report"], ["char"], ["charges"], [""], ["ch\u0430rge"], ["charge\x00"], ["**"], ["."]),
    ],
)
def test_b01_one_scope_outside_the_grant_refuses_the_whole_request(scopes: list[str]) -> None:
    """Never silently narrowed; another spelling of a scope is another scope."""
    decision = policy().decide(ORDERS, "payments", scopes)
    assert Denial(DenialReason.SCOPE_NOT_GRANTED, tuple(s for s in scopes if s != "charge")) == decision


def test_b01_order_and_repetition_of_scopes_say_nothing() -> None:
    """Scopes are a set (RFC 6749 section 3.3)."""
    for scopes in (["report", "charge"], ["charge", "report", "charge"], iter(("charge", "report"))):
        assert ("charge", "report") == granted(policy().decide(ORDERS, "payments", scopes)).scopes


def test_b01_ten_thousand_scopes_are_refused_at_once() -> None:
    """The decision names what is outside, sorted, and costs no more than reading the request."""
    scopes = [f"s{number}" for number in range(10_000)]
    decision = policy().decide(ORDERS, "payments", ["charge", *scopes])
    assert Denial(DenialReason.SCOPE_NOT_GRANTED, tuple(sorted(scopes))) == decision


@pytest.mark.parametrize(
    "audience",
    [
        *("bank", "payment", "payments ", " payments", "Payments", "PAYMENTS", "payments/", "payments\x00", "*", "**"),
        *(
            "pay*",
            "pay.ents",
            ".*",
            "payments|bank",
            "bank/../payments",
            "",
            "p\u0430yments",
            "payments\n",
            "mail,bank",
        ),
    ],
)
def test_b02_an_audience_is_compared_whole_and_as_it_is(audience: str) -> None:
    """No pattern, no folding, no path, no list: one that is not granted and one that is not there read the same."""
    assert policy().decide(ORDERS, audience, ["charge"]) is policy().decide(ORDERS, "no-such-thing")
    assert NOT_GRANTED == policy().decide(ORDERS, audience, ["charge"])


@pytest.mark.parametrize(
    "workload",
    [
        "spiffe://prod.example/ns/shop/sa/orders2",
        "spiffe://prod.example/ns/shop/sa/Orders",
        "spiffe://prod.example/ns/shop/sa/orders/x",
        "spiffe://prod.example/ns/shop/sa",
        "spiffe://prod.example/ns/shop",
        "spiffe://prod.example/orders",
    ],
)
def test_b02_a_workload_is_compared_segment_by_segment(workload: str) -> None:
    """Nothing that begins or ends like a granted name is that name."""
    assert isinstance(policy().decide(SpiffeID.parse(workload), "payments", ["charge"]), Denial)


@pytest.mark.parametrize(
    "domain", ["staging.example", "prod.example.evil", "example", "sub.prod.example", "prod-example"]
)
def test_a_workload_of_another_trust_domain_has_no_grant(domain: str) -> None:
    """The same path in another trust domain is another workload, also for a pattern."""
    for path in ("ns/shop/sa/orders", "ns/shop/sa/cron", "ns/shop/anything"):
        for audience in ("payments", "mail"):
            assert NOT_GRANTED == policy().decide(SpiffeID.parse(f"spiffe://{domain}/{path}"), audience)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("ns/*/sa/x", ["ns/a/sa/x", "ns/b/sa/x"], ["ns/sa/x", "ns/a/b/sa/x", "ns/a/sa/y", "ns/a/sa/x/y"]),
        ("*", ["a", "zz"], ["a/b"]),
        ("**", ["a", "a/b", "a/b/c"], []),
        ("ns/**", ["ns/a", "ns/a/b"], ["ns", "nsx/a", "x/ns/a"]),
        ("*/**", ["a/b", "a/b/c"], ["a"]),
        ("ns/*", ["ns/a"], ["ns", "ns/a/b"]),
        ("*/*/c", ["a/b/c"], ["a/b", "a/b/d", "a/b/c/d"]),
    ],
)
def test_a_wildcard_stands_for_whole_segments(pattern: str, matching: list[str], others: list[str]) -> None:
    """``*`` for exactly one, ``**`` for one or more at the end."""
    loaded = load_policy(changed("shop/**", f"shop/{pattern}"), "policy.yaml")
    for path in matching:
        granted(loaded.decide(SpiffeID.parse(f"spiffe://prod.example/ns/shop/{path}"), "mail"))
    for path in others:
        assert NOT_GRANTED == loaded.decide(SpiffeID.parse(f"spiffe://prod.example/ns/shop/{path}"), "mail")


def test_grants_of_one_workload_add_up_scope_by_scope() -> None:
    """A token lives as long as its shortest scope; a scope as long as its most generous grant."""
    loaded = policy()
    assert timedelta(minutes=10) == granted(loaded.decide(ORDERS, "payments", ["charge"])).max_ttl
    assert timedelta(minutes=1) == granted(loaded.decide(ORDERS, "payments", ["charge", "report"])).max_ttl
    longer = load_policy(changed("scopes: [charge] }", "scopes: [charge, report], max_ttl: 5m }"), "policy.yaml")
    given = granted(longer.decide(ORDERS, "payments"))
    assert (timedelta(minutes=5), "policy.yaml:15: grants[0]") == (given.max_ttl, given.rule)
    assert timedelta(minutes=1) == granted(longer.decide(CRON, "payments")).max_ttl


def test_of_grants_that_give_the_same_the_first_decides() -> None:
    """So that the rule in an audit record does not depend on how the index is built."""
    text = changed("scopes: [charge] }", "scopes: [charge, report], max_ttl: 1m }")
    assert "policy.yaml:15: grants[0]" == granted(load_policy(text, "policy.yaml").decide(ORDERS, "payments")).rule


def test_acting_for_another_adds_up_from_the_grants_that_allow_it_alone() -> None:
    """Every scope has to come from such a grant, and lives no longer than that grant says."""
    text = changed("audience: payments, scopes: [report], max_ttl: 1m", "audience: payments, scopes: [charge, report]")
    acting = load_policy(text.replace("[charge] }", "[charge], max_ttl: 2m, may_act: true }"), "policy.yaml")
    given = granted(acting.decide(ORDERS, "payments", ["charge"]))
    assert (timedelta(minutes=10), timedelta(minutes=2)) == (given.max_ttl, given.acting_max_ttl)
    assert given.may_act
    assert not granted(acting.decide(ORDERS, "payments", ["charge", "report"])).may_act
    assert not granted(acting.decide(CRON, "payments", ["charge"])).may_act


def test_a_policy_without_grants_refuses_everything() -> None:
    """Empty means refuse."""
    head = policy()
    empty = dataclasses.replace(head, grants=(), tests=())
    for workload in (ORDERS, PAYMENTS, OUTSIDER):
        for audience in (*head.audiences, "nothing"):
            assert NOT_GRANTED == empty.decide(workload, audience)


def test_a_policy_cannot_be_changed() -> None:
    """It is replaced as a whole, so each decision comes from one version."""
    loaded = policy()
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.issuer = "https://else.example"  # type: ignore[misc]
    with pytest.raises(TypeError):
        loaded.audiences["new"] = loaded.audiences["bank"]  # type: ignore[index]


def test_b12_a_decision_costs_the_same_however_many_grants_there_are(large_policy: Policy) -> None:
    """By index and not by search: for names, for patterns, for refusals, and for a SPIFFE ID of 1,000 segments."""
    small = policy()
    workloads = [
        SpiffeID.parse("spiffe://prod.example/ns/n7/sa/w777"),
        SpiffeID.parse("spiffe://prod.example/ns/n7/sa/nobody"),
        SpiffeID.parse("spiffe://prod.example/" + "/".join("a" * 1000)),
    ]
    granted(large_policy.decide(workloads[0], "a77", ["read"]))

    def cost(loaded: Policy, workload: SpiffeID, audience: str) -> float:
        return min(timeit.repeat(lambda: loaded.decide(workload, audience, ["read"]), number=200, repeat=5))

    baseline = cost(small, ORDERS, "payments")
    assert [] == [str(workload) for workload in workloads if cost(large_policy, workload, "a77") > 10 * baseline]


@pytest.fixture(name="large_policy", scope="module")
def _large_policy() -> Policy:
    lines = ["issuer: https://tokens.prod.example", "trust_domain: prod.example", "audiences:"]
    lines += [f"  a{number}: {{ scopes: [read, write] }}" for number in range(100)]
    lines.append("grants:")
    for number in range(count("grants_in_one_policy")):
        name = f"sa/w{number}" if number % 10 else f"*/w{number}"
        place = f"spiffe://prod.example/ns/n{number // 100}/{name}"
        lines.append(f"  - {{ workload: {place}, audience: a{number % 100}, scopes: [read] }}")
    return load_policy("\n".join(lines), "large.yaml")
