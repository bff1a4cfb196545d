"""Name constraints (RFC 5280 section 4.2.1.10): what a CA may not vouch for.

URI and DNS names are checked. A constraint of any other form refuses each certificate that has a name of that form,
which is what section 4.2.1.10 asks of those who do not process it.
"""

from __future__ import annotations

import re
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from carnet_broker.core.certificates import ParsedCertificate

__all__ = ["forbidden_name"]

_MAX_COMPARISONS: Final = 4096
"""Names times constraints. A CA and its leaf can make each other expensive; nobody needs more."""

# The constraint of a URI is about its host, and there must be one (section 4.2.1.10).
_URI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>[A-Za-z0-9._-]+)(?::[0-9]*)?(?:[/?#].*)?")

_EMAIL_OF_SUBJECT: Final = x509.RFC822Name("in-the-subject@invalid")
"""Stands for whatever address the subject holds: constraints of this form are not compared."""


def forbidden_name(constraints: x509.NameConstraints, certificate: ParsedCertificate) -> str | None:
    """Return the first name of `certificate` that `constraints` forbid, None where they allow all."""
    permitted, excluded = tuple(constraints.permitted_subtrees or ()), tuple(constraints.excluded_subtrees or ())
    names = _all_names(certificate)
    if len(names) * (len(permitted) + len(excluded)) > _MAX_COMPARISONS:
        return "(too many names and constraints)"
    for name in names:
        form = type(name)
        allowed = [subtree for subtree in permitted if type(subtree) is form]
        refused = [subtree for subtree in excluded if type(subtree) is form]
        if allowed and not any(_is_within(name, subtree, unknown=False) for subtree in allowed):
            return _shown(name)
        if any(_is_within(name, subtree, unknown=True) for subtree in refused):
            return _shown(name)
    return None


def _all_names(certificate: ParsedCertificate) -> list[x509.GeneralName]:
    """Return the alternative names, and what the subject holds of the same forms (RFC 5280 section 6.1.3 (b), (c))."""
    names = list(certificate.names)
    if list(certificate.subject):
        names.append(x509.DirectoryName(certificate.subject))
    if certificate.subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS):
        names.append(_EMAIL_OF_SUBJECT)
    return names


def _is_within(name: x509.GeneralName, subtree: x509.GeneralName, *, unknown: bool) -> bool:
    """Say whether `name` is in `subtree` of the same form; `unknown` is the answer where that cannot be told."""
    match name, subtree:
        case x509.UniformResourceIdentifier(), x509.UniformResourceIdentifier():
            uri = _URI.fullmatch(name.value)
            if uri is None:
                return unknown
            host, base = uri["host"].lower(), subtree.value.lower()
            # A leading period: any host below the domain, and not the domain itself. None: this host alone.
            return host.endswith(base) and len(host) > len(base) if base.startswith(".") else host == base
        case x509.DNSName(), x509.DNSName():
            host, base = name.value.lower(), subtree.value.lower()
            # Labels added on the left are within; a leading period, seen in the wild, asks for at least one.
            return host == base or not base or host.endswith(base if base.startswith(".") else f".{base}")
    return unknown


def _shown(name: x509.GeneralName) -> str:
    return repr(name)[:120]
