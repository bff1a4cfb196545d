"""Who may use the admin port, and from where."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from carnet.spiffe import SpiffeID
from carnet_broker.core.admins import admin_of, peer_address
from carnet_broker.core.policy import Policy, load_policy

ADMIN = SpiffeID.parse("spiffe://prod.example/ns/ops/sa/breakglass")
ANYWHERE = SpiffeID.parse("spiffe://prod.example/ns/ops/sa/anywhere")
POLICY = f"""\
issuer: https://tokens.prod.example
trust_domain: prod.example
audiences: {{ payments: {{ scopes: [charge] }} }}
grants: []
admins:
  - {{ workload: {ADMIN}, from: [127.0.0.0/8, "2001:db8::/32"] }}
  - {{ workload: {ANYWHERE} }}
"""


@pytest.fixture(name="policy")
def _policy() -> Policy:
    return load_policy(POLICY, "policy.yaml")


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:50000", "127.0.0.1"),
        ("ipv6:[2001:db8::1]:50000", "2001:db8::1"),
        ("ipv6:%5B2001:db8::1%5D:50000", "2001:db8::1"),
        ("ipv6:[::ffff:192.0.2.7]:50000", "192.0.2.7"),
        ("ipv6:%5B::ffff:7f00:1%5D:1", "127.0.0.1"),
    ],
)
def test_an_address_is_read_as_grpc_writes_it(peer: str, address: str) -> None:
    """A mapped IPv4 address is that IPv4 address."""
    assert ip_address(address) == peer_address(peer)


@pytest.mark.parametrize(
    "peer",
    [
        "",
        "unix:/run/carnet.sock",
        "127.0.0.1:50000",
        "ipv4:127.0.0.1",
        "ipv4:127.0.0.256:50000",
        "ipv4:127.0.0.1:50000\n",
        "ipv4:127.0.0.1,10.0.0.1:50000",
        "ipv6:[fe80::1%25eth0]:50000",
        "ipv6:[1::2::3]:50000",
        "ipv6:2001:db8::1:50000",
    ],
)
def test_what_is_no_address_is_none(peer: str) -> None:
    """Nothing is guessed."""
    assert peer_address(peer) is None


@pytest.mark.parametrize(
    ("workload", "peer", "is_admin"),
    [
        (ADMIN, "ipv4:127.0.0.1:5", True),
        (ADMIN, "ipv6:[::ffff:127.0.0.1]:5", True),
        (ADMIN, "ipv6:[2001:db8::9]:5", True),
        (ADMIN, "ipv4:10.0.0.1:5", False),
        (ADMIN, "ipv6:[::1]:5", False),
        (ADMIN, "unix:/run/carnet.sock", False),
        (ANYWHERE, "ipv4:10.0.0.1:5", True),
        (ANYWHERE, "unix:/run/carnet.sock", False),
        (SpiffeID.parse("spiffe://prod.example/ns/ops/sa/breakglass2"), "ipv4:127.0.0.1:5", False),
        (SpiffeID.parse("spiffe://other.example/ns/ops/sa/breakglass"), "ipv4:127.0.0.1:5", False),
    ],
)
def test_identity_and_address_decide_together(policy: Policy, workload: SpiffeID, peer: str, *, is_admin: bool) -> None:
    """The whole identity, and one of its networks where it names any."""
    assert is_admin == (admin_of(policy, workload, peer_address(peer)) is not None)
