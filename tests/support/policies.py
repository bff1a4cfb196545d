"""One policy that the tests of the policy share, and the names in it."""

from __future__ import annotations

from carnet.spiffe import SpiffeID
from carnet_broker.core.policy import Denial, Granted, Policy, load_policy

ORDERS = SpiffeID.parse("spiffe://prod.example/ns/shop/sa/orders")
CRON = SpiffeID.parse("spiffe://prod.example/ns/shop/sa/cron")
PAYMENTS = SpiffeID.parse("spiffe://prod.example/ns/shop/sa/payments")
OUTSIDER = SpiffeID.parse("spiffe://prod.example/ns/else/sa/outsider")

POLICY = """\
issuer: https://tokens.prod.example
trust_domain: prod.example
audiences:
  payments:
    served_by: [spiffe://prod.example/ns/shop/sa/payments]
    scopes: [charge, refund, report]
    max_ttl: 10m
  bank:
    scopes: [transfer]
    binding: none
  mail:
    scopes: [send]
    max_ttl: 1h
grants:
  - { workload: spiffe://prod.example/ns/shop/sa/orders, audience: payments, scopes: [charge] }
  - { workload: spiffe://prod.example/ns/shop/sa/*, audience: payments, scopes: [report], max_ttl: 1m }
  - { workload: spiffe://prod.example/ns/shop/sa/payments, audience: bank, scopes: [transfer], may_act: true }
  - { workload: spiffe://prod.example/ns/shop/**, audience: mail, scopes: [send] }
admins:
  - { workload: spiffe://prod.example/ns/ops/sa/breakglass, from: [127.0.0.0/8, "::1/128"] }
tests:
  - { workload: spiffe://prod.example/ns/shop/sa/orders, audience: payments, scopes: [charge], expect: allow }
  - { workload: spiffe://prod.example/ns/shop/sa/orders, audience: payments, scopes: [refund], expect: deny }
"""


def changed(old: str, new: str) -> str:
    """The policy with one thing changed."""
    assert 1 == POLICY.count(old), f"{old!r} is not once in the policy"
    return POLICY.replace(old, new)


def policy() -> Policy:
    """The policy, loaded."""
    return load_policy(POLICY, "policy.yaml")


def granted(decision: Granted | Denial) -> Granted:
    """The decision, which has to be a yes."""
    assert isinstance(decision, Granted), decision
    return decision
