from __future__ import annotations

import pytest

from carnet.errors import InvalidIdentityError
from carnet.spiffe import SpiffeID, SpiffeIDPattern, server_dns_name

ORDERS = "spiffe://prod.example/ns/shop/sa/orders"
LONGEST_TRUST_DOMAIN = "a" * 255


@pytest.mark.parametrize(
    "text",
    [
        ORDERS,
        "spiffe://prod.example/x",
        "spiffe://a_b-c.1/A.b_c-9/...",
        f"spiffe://{LONGEST_TRUST_DOMAIN}/x",
        f"spiffe://prod.example/{'x' * (2048 - len('spiffe://prod.example/'))}",
    ],
)
def test_spiffe_id_comes_back_as_it_was_written(text: str) -> None:
    """A SPIFFE ID has one spelling, up to the longest trust domain (255) and the longest id (2,048)."""
    assert text == str(SpiffeID.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "prod.example/ns",
        "https://prod.example/x",
        "SPIFFE://prod.example/x",
        "spiffe:/prod.example/x",
        "spiffe://",
        "spiffe:///x",
        "spiffe://prod.example",
        "spiffe://prod.example/",
        "spiffe://prod.example//x",
        "spiffe://prod.example/x/",
        "spiffe://prod.example/./x",
        "spiffe://prod.example/x/..",
        "spiffe://Prod.example/x",
        "spiffe://prod.example:8443/x",
        "spiffe://user@prod.example/x",
        "spiffe://[::1]/x",
        "spiffe://prod.example/x?q",
        "spiffe://prod.example/x#f",
        "spiffe://prod.example/%61",
        "spiffe://prod.example/x\n",
        "spiffe://prod.example/x\x00",
        "spiffe://prod.example/*",
        "spiffe://pröd.example/x",
        f"spiffe://{LONGEST_TRUST_DOMAIN}a/x",
        f"spiffe://prod.example/{'x' * (2049 - len('spiffe://prod.example/'))}",
    ],
)
def test_what_is_no_spiffe_id_is_refused(text: str) -> None:
    """Nothing beside the one spelling is a SPIFFE ID (SPIFFE ID sections 2.1 and 2.2)."""
    with pytest.raises(InvalidIdentityError):
        SpiffeID.parse(text)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("ns/shop/sa/orders", "ns/shop/sa/orders", True),
        ("ns/shop/sa/orders", "ns/shop/sa/order", False),
        ("ns/shop/sa/orders", "ns/shop/sa/orders/x", False),
        ("ns/*/sa/orders", "ns/shop/sa/orders", True),
        ("ns/*/sa/orders", "ns/shop/x/sa/orders", False),
        ("ns/*/sa/orders", "ns/sa/orders", False),
        ("ns/shop/*", "ns/shop", False),
        ("ns/shop/**", "ns/shop/sa/orders", True),
        ("ns/shop/**", "ns/shop", False),
        ("ns/shop/**", "ns/shopper/sa", False),
        ("**", "x", True),
        ("*/**", "x", False),
    ],
)
def test_wildcards_stand_for_whole_segments(pattern: str, path: str, expected: bool) -> None:
    """One star is one segment, two stars are one or more, and neither is part of a segment or nothing."""
    parsed = SpiffeIDPattern.parse(f"spiffe://prod.example/{pattern}")
    assert expected is parsed.matches(SpiffeID.parse(f"spiffe://prod.example/{path}"))
    assert f"spiffe://prod.example/{pattern}" == str(parsed)


def test_pattern_is_of_one_trust_domain() -> None:
    """Even the widest pattern does not reach into another trust domain."""
    assert not SpiffeIDPattern.parse("spiffe://prod.example/**").matches(SpiffeID.parse("spiffe://staging.example/x"))


@pytest.mark.parametrize("path", ["", "/", "/**/x", "/x*", "/ns/***", "/../x", "//x"])
def test_what_is_no_pattern_is_refused(path: str) -> None:
    """A pattern has a path, and a wildcard is a segment of its own; two stars are the last one."""
    with pytest.raises(InvalidIdentityError):
        SpiffeIDPattern.parse(f"spiffe://prod.example{path}")


def test_exact_pattern_knows_its_one_id() -> None:
    """A pattern without a wildcard is one SPIFFE ID; one with a wildcard is none."""
    assert SpiffeID.parse(ORDERS) == SpiffeIDPattern.parse(ORDERS).exact
    assert SpiffeIDPattern.parse("spiffe://prod.example/ns/*").exact is None
    assert SpiffeIDPattern.parse("spiffe://prod.example/**").exact is None


def test_serving_workload_has_one_dns_name() -> None:
    """The DNS name follows from namespace, name and trust domain."""
    assert "orders.shop.svc.prod.example" == server_dns_name(SpiffeID.parse(ORDERS))


@pytest.mark.parametrize(
    "path", ["x", "ns/shop/sa", "ns/shop/sa/orders/x", "sa/shop/ns/orders", "ns/Shop/sa/orders", "ns/shop/sa/a.b"]
)
def test_workload_of_another_shape_cannot_serve(path: str) -> None:
    """Two SPIFFE IDs never share a DNS name: only the one shape, with DNS labels, has one."""
    with pytest.raises(InvalidIdentityError, match="has no DNS name"):
        server_dns_name(SpiffeID.parse(f"spiffe://prod.example/{path}"))
