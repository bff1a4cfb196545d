"""Who may use the admin port, and from where. Pure.

Rules
-----
1. The caller's SPIFFE ID must be that of an admin of the policy, whole. That is the control.
2. Its address must be in one of the networks that the policy names for it, where it names any. That is defence in
   depth. An address that cannot be read is in no network, and may not call at all.
3. An IPv4 address that came over an IPv6 socket (::ffff:192.0.2.1, RFC 4291 section 2.5.5.2) is that IPv4 address: a
   network of the policy means the same on either socket.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from carnet.spiffe import SpiffeID
from carnet_broker.core.policy.model import Admin, Policy

__all__ = ["admin_of", "peer_address"]

_IPV4: Final = re.compile(r"ipv4:([0-9.]{7,15}):[0-9]{1,5}", re.ASCII)
_IPV6: Final = re.compile(r"ipv6:(?:\[|%5B)([0-9A-Fa-f:.]{2,45})(?:\]|%5D):[0-9]{1,5}", re.ASCII)
"""The address in brackets, which gRPC writes as a URI does. One with a zone (fe80::1%eth0) is not read."""


def peer_address(peer: str) -> IPv4Address | IPv6Address | None:
    """Return the address of `peer`, in the form in which gRPC writes it, or None where it is no address."""
    try:
        if (found := _IPV4.fullmatch(peer)) is not None:
            return IPv4Address(found[1])
        if (found := _IPV6.fullmatch(peer)) is not None:
            address = IPv6Address(found[1])
            return address.ipv4_mapped or address
    except ValueError:
        pass
    return None


def admin_of(policy: Policy, workload: SpiffeID, address: IPv4Address | IPv6Address | None) -> Admin | None:
    """Return the entry of the policy by which `workload` may use the admin port from `address`, None for none."""
    if address is None:
        return None
    for admin in policy.admins:
        if admin.workload == workload and (not admin.networks or any(address in net for net in admin.networks)):
            return admin
    return None
