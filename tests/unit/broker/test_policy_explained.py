"""Why a policy decides as it does: the line that decided, and what would have allowed it."""

from __future__ import annotations

import pytest

from carnet.spiffe import SpiffeID
from carnet_broker.core.policy import compile_policy, explain
from support.policies import CRON, ORDERS, OUTSIDER, PAYMENTS, POLICY, changed, policy


def hints(workload: SpiffeID, audience: str, *scopes: str) -> tuple[str, ...]:
    """What is said about a request that is denied: the summary, then the hints."""
    explanation = explain(policy(), workload, audience, scopes)
    assert not explanation.allowed
    return (explanation.summary, *explanation.hints)


def test_a_yes_names_the_grant_with_file_and_line() -> None:
    """And what it gives, for how long, and how it is bound."""
    explanation = explain(policy(), ORDERS, "payments", ["charge"])
    assert explanation.allowed
    assert () == explanation.hints
    assert (
        "policy.yaml:15: grants[0] gives spiffe://prod.example/ns/shop/sa/orders the scopes charge of payments, for at"
        " most 10m, bound to the caller's certificate"
    ) == explanation.summary


def test_a_yes_of_several_grants_names_all_of_them() -> None:
    """In the order of the file."""
    assert (
        "policy.yaml:15: grants[0], policy.yaml:16: grants[1] together give spiffe://prod.example/ns/shop/sa/orders the"
        " scopes charge, report of payments, for at most 1m, bound to the caller's certificate"
    ) == explain(policy(), ORDERS, "payments").summary


def test_a_yes_without_binding_says_so() -> None:
    """An unbound token is worth a look."""
    assert explain(policy(), PAYMENTS, "bank").summary.endswith("for at most 5m, not bound")


def test_a_scope_that_is_not_given_is_named_with_the_grant_to_add_it_to() -> None:
    """The nearest thing that would have allowed it."""
    assert (
        "spiffe://prod.example/ns/shop/sa/orders has a grant of payments, but not with refund",
        "policy.yaml:15: grants[0] gives charge",
        "policy.yaml:16: grants[1] gives report",
        "to allow refund, add it to the scopes of policy.yaml:15: grants[0]",
    ) == hints(ORDERS, "payments", "charge", "refund")


def test_a_scope_that_does_not_exist_is_answered_with_the_closest_that_does() -> None:
    """A slip of the pen is more likely than a missing scope."""
    assert (
        "policy.yaml:4: audiences.payments has no scope chrge; did you mean charge?",
        "policy.yaml:4: audiences.payments has no scope zzz; its scopes are charge, refund, report",
    ) == hints(ORDERS, "payments", "chrge", "zzz")[-2:]


def test_an_audience_that_does_not_exist_is_answered_with_the_closest_that_does() -> None:
    """Or with those that there are."""
    assert ("policy.yaml has no audience paymnts", "did you mean payments?") == hints(ORDERS, "paymnts")
    assert ("policy.yaml has no audience zzz", "the audiences are bank, mail, payments") == hints(ORDERS, "zzz")


def test_a_workload_without_a_grant_is_answered_with_the_closest_pattern() -> None:
    """And with what it may call instead."""
    assert (
        "no grant of bank names spiffe://prod.example/ns/shop/sa/orders",
        "the closest is policy.yaml:17: grants[2], for spiffe://prod.example/ns/shop/sa/payments",
        "this workload has grants of payments, mail",
    ) == hints(ORDERS, "bank")


def test_a_workload_without_any_grant_is_told_so() -> None:
    """It may be a name that nobody entered yet."""
    assert (
        "no grant of mail names spiffe://prod.example/ns/else/sa/outsider",
        "the closest is policy.yaml:18: grants[3], for spiffe://prod.example/ns/shop/**",
        "this workload has no grant at all",
    ) == hints(OUTSIDER, "mail")


def test_an_audience_without_any_grant_is_told_so() -> None:
    """There is no closest pattern then."""
    text = POLICY.replace("  - { workload: spiffe://prod.example/ns/shop/**, audience: mail, scopes: [send] }\n", "")
    explanation = explain(compile_policy(text, "policy.yaml"), CRON, "mail")
    assert ("no workload has a grant of mail", "this workload has grants of payments") == explanation.hints


@pytest.mark.parametrize(
    ("workload", "closest"),
    [
        ("spiffe://prod.example/ns/shop/sa/payments2", "spiffe://prod.example/ns/shop/sa/payments"),
        ("spiffe://prod.example/ns/shop/sa/order", "spiffe://prod.example/ns/shop/sa/orders"),
        ("spiffe://prod.example/ns/bank/x", "spiffe://prod.example/ns/bank/*/teller"),
        ("spiffe://prod.example/ns/bank/sa/tellers", "spiffe://prod.example/ns/bank/*/teller"),
        ("spiffe://prod.example/zzz", "spiffe://prod.example/short"),
    ],
)
def test_the_closest_pattern_is_alike_by_segments_then_by_spelling(workload: str, closest: str) -> None:
    """What begins the same comes first; among those, what is spelled most alike."""
    names = [
        "ns/shop/sa/orders",
        "ns/shop/sa/payments",
        "ns/bank/*/teller",
        "short",
        *(f"ns/a{n}/sa/x" for n in range(40)),
    ]
    grants = [
        f"  - {{ workload: spiffe://prod.example/{name}, audience: bank, scopes: [transfer] }}\n" for name in names
    ]
    text = POLICY[: POLICY.index("grants:")] + "grants:\n" + "".join(grants)
    hint = explain(compile_policy(text, "policy.yaml"), SpiffeID.parse(workload), "bank").hints[0]
    assert hint.endswith(f", for {closest}")


def test_a_workload_of_another_trust_domain_is_told_whose_policy_this_is() -> None:
    """A staging name put to a production policy."""
    assert (
        "spiffe://staging.example/x is of another trust domain: policy.yaml is for prod.example",
        "the broker refuses its certificate before it asks the policy",
    ) == hints(SpiffeID.parse("spiffe://staging.example/x"), "payments")


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nb", "a\u2028b", 'a"b', "a b", "", "x" * 10_000])
def test_b10_what_was_asked_is_printed_safely(name: str) -> None:
    """An audience or a scope from a log may hold anything; the explanation stays one short line for each."""
    for words in (hints(ORDERS, name), hints(ORDERS, "payments", name)):
        assert all(word.isprintable() and len(word) < 300 for word in words)


def test_long_lists_are_cut() -> None:
    """The first five, and how many more."""
    words = hints(ORDERS, "payments", *(f"s{number}" for number in range(50)))
    assert words[0].endswith("but not with s0, s1, s10, s11, s12 and 45 more")
    assert len(words) == 1 + 2 + 5


def test_an_explanation_can_be_read_by_machines() -> None:
    """The same facts, by name."""
    allowed = explain(policy(), PAYMENTS, "bank").to_dict()
    assert {
        "decision": "allow",
        "scopes": ["transfer"],
        "max_ttl": "5m",
        "binding": "none",
        "may_act": True,
        "rules": [{"file": "policy.yaml", "line": 17, "grant": 2}],
        "summary": explain(policy(), PAYMENTS, "bank").summary,
        "hints": [],
    } == allowed
    denied = explain(policy(), ORDERS, "payments", ["refund"]).to_dict()
    assert ("deny", "SCOPE_NOT_GRANTED", ["refund"]) == tuple(
        denied[name] for name in ("decision", "reason", "scopes_outside")
    )


def test_the_explanation_is_the_decision() -> None:
    """It is never a second opinion."""
    loaded = compile_policy(changed("[charge] }", "[charge, refund] }"), "policy.yaml")
    for workload in (ORDERS, CRON, PAYMENTS, OUTSIDER):
        for audience in (*loaded.audiences, "none"):
            for scopes in ([], ["charge"], ["refund", "send"]):
                expected = loaded.decide(workload, audience, scopes)
                assert expected == explain(loaded, workload, audience, scopes).decision
