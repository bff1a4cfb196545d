"""Rules T01 and T11 to T13: who signed it, and what the chain allows (RFC 5280 section 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from carnet.testing.ca import CertificateAuthority
from certificate_recipe import (
    Authority,
    Presented,
    common_name,
    extension,
    good_name,
    intermediate,
    leaf,
    p256_key,
    tlv,
)
from wrong_kind import Build, Expected, WrongCertificate

__all__ = ["CHAINS"]

_HOUR: Final = timedelta(hours=1)
_DEEP: Final = 50
_MANY: Final = 1_100
_TOO_MANY: Final = 10_000


def _root(ca: CertificateAuthority) -> Authority:
    return Authority.of(ca.root, send=False)


def _below(ca: CertificateAuthority) -> Authority:
    return Authority.of(ca.intermediate, send=True)


def _nothing(_ca: CertificateAuthority, _now: datetime) -> Presented:
    return Presented(b"", b"")


def _self_signed(ca: CertificateAuthority, now: datetime) -> Presented:
    key = p256_key()
    return leaf(ca, now, key=key, by=Authority(common_name("orders"), key), subject=common_name("orders"))


def _other_authority(ca: CertificateAuthority, now: datetime) -> Presented:
    other = CertificateAuthority.create(ca.trust_domain, now=now)
    by = intermediate("somebody", Authority(common_name("somebody's root"), other.root.private_key), now)
    return leaf(ca, now, by=by)


def _same_subject_other_key(ca: CertificateAuthority, now: datetime) -> Presented:
    root = Authority(ca.root.certificate.subject, p256_key())
    by = intermediate(f"{ca.trust_domain} intermediate", root, now)
    return leaf(ca, now, by=by)


def _same_intermediate_other_key(ca: CertificateAuthority, now: datetime) -> Presented:
    """Signed by an impostor, presented with the real intermediate's certificate."""
    real = _below(ca)
    return leaf(ca, now, by=Authority(real.subject, p256_key(), real.chain))


def _constrained(*, permitted: Sequence[x509.GeneralName] = (), excluded: Sequence[x509.GeneralName] = ()) -> Build:
    """Return the builder of a good leaf under an intermediate with name constraints (RFC 5280 section 4.2.1.10)."""
    value = x509.NameConstraints(permitted or None, excluded or None).public_bytes()

    def build(ca: CertificateAuthority, now: datetime) -> Presented:
        by = intermediate("constrained", _root(ca), now, extra=[extension("2.5.29.30", value, critical=True)])
        return leaf(ca, now, by=by)

    return build


_URI, _DNS = x509.UniformResourceIdentifier, x509.DNSName


def _constrained_to_its_domain(ca: CertificateAuthority, now: datetime) -> Presented:
    return _constrained(permitted=[_URI(ca.trust_domain)])(ca, now)


def _excluded_domain(ca: CertificateAuthority, now: datetime) -> Presented:
    return _constrained(excluded=[_URI(ca.trust_domain)])(ca, now)


def _depth_two(ca: CertificateAuthority, now: datetime) -> Presented:
    return leaf(ca, now, by=intermediate("second", intermediate("first", _root(ca), now, path_length=1), now))


def _path_length_exceeded(ca: CertificateAuthority, now: datetime) -> Presented:
    return leaf(ca, now, by=intermediate("second", intermediate("first", _root(ca), now, path_length=0), now))


def _issuer_not_ca(ca: CertificateAuthority, now: datetime) -> Presented:
    return leaf(ca, now, by=intermediate("not a CA", _root(ca), now, ca=False))


def _leaf_as_issuer(ca: CertificateAuthority, now: datetime) -> Presented:
    """Return a certificate for another workload, signed by a workload with its own, good leaf."""
    key = p256_key()
    workload = leaf(ca, now, key=key, subject=common_name("workload"))
    sent = tuple(c.public_bytes(Encoding.DER) for c in x509.load_pem_x509_certificates(workload.chain_pem))
    return leaf(ca, now, by=Authority(common_name("workload"), key, sent))


def _deep(ca: CertificateAuthority, now: datetime) -> Presented:
    by = _root(ca)
    for level in range(_DEEP):
        by = intermediate(f"level {level}", by, now)
    return leaf(ca, now, by=by)


def _cycle(ca: CertificateAuthority, now: datetime) -> Presented:
    first, second = Authority(common_name("first"), p256_key()), Authority(common_name("second"), p256_key())
    by_second = intermediate("first", second, now, key=first.key)
    by_first = intermediate("second", first, now, key=second.key)
    return leaf(ca, now, by=Authority(first.subject, first.key, (*by_second.chain, *by_first.chain)))


def _many_constraints(count: int, names: int) -> Build:
    """Return the builder of a chain that costs `count` x `names` comparisons."""
    tree = x509.NameConstraints([_DNS(f"h{number}.example") for number in range(count)], None).public_bytes()

    def build(ca: CertificateAuthority, now: datetime) -> Presented:
        by = intermediate("many", _root(ca), now, extra=[extension("2.5.29.30", tree, critical=True)])
        last = f"h{count - 1}.example".encode()
        return leaf(ca, now, by=by, names=[tlv(0x86, good_name(ca).encode()), *[tlv(0x82, last)] * names])

    return build


def _sent(*, before: Sequence[str] = (), after: Sequence[str] = (), itself: bool = True) -> Build:
    """Return the builder of a good leaf with other certificates than its intermediate before and after that one."""

    def build(ca: CertificateAuthority, now: datetime) -> Presented:
        real = _below(ca)
        stranger = Authority(common_name("stranger's root"), p256_key())
        name = f"{ca.trust_domain} intermediate"
        key = ca.intermediate.private_key
        others = {
            "root": (ca.root.certificate.public_bytes(Encoding.DER),),
            "stranger": intermediate("stranger", stranger, now).chain,
            # Cross-signed: the same name and key as our intermediate, by somebody else or for another time.
            "by stranger": intermediate(name, stranger, now, key=key).chain,
            "expired": intermediate(
                name, _root(ca), now, key=key, not_before=now - 2 * _HOUR, not_after=now - _HOUR
            ).chain,
        }
        chain = [*(others[kind][0] for kind in before), *real.chain[:itself], *(others[kind][0] for kind in after)]
        return leaf(ca, now, by=Authority(real.subject, real.key, tuple(chain)))

    return build


def _wrong_order(ca: CertificateAuthority, now: datetime) -> Presented:
    by = intermediate("second", intermediate("first", _root(ca), now), now)
    return leaf(ca, now, by=Authority(by.subject, by.key, by.chain[::-1]))


_H, _U, _A = Expected.HANDSHAKE, Expected.UNAUTHENTICATED, Expected.ACCEPT

_CASES: Final[Mapping[str, tuple[Expected, str, Build]]] = {
    "T01-good": (_A, "twin: by the intermediate of the trusted root", leaf),
    "T01-no-certificate": (_H, "shows nothing", _nothing),
    "T01-self-signed": (_H, "signed by its own key", _self_signed),
    "T01-other-authority": (_H, "by a root that nobody trusts", _other_authority),
    "T01-same-subject-other-key": (_H, "by a root with the name of ours", _same_subject_other_key),
    "T01-same-intermediate-other-key": (_H, "by an impostor of our intermediate", _same_intermediate_other_key),
    "T11-permitted": (_A, "twin: constrained to the trust domain", _constrained_to_its_domain),
    "T11-other-permitted": (
        _H,
        "constrained to another trust domain",
        _constrained(permitted=[_URI("staging.example")]),
    ),
    "T11-excluded": (_H, "the trust domain is excluded", _excluded_domain),
    "T11-sub-domain-permitted": (_H, "constrained to sub-domains", _constrained(permitted=[_URI(".prod.example")])),
    "T11-dns-only": (_A, "twin: a DNS constraint, and no DNS name", _constrained(permitted=[_DNS("svc.prod.example")])),
    "T12-depth-two": (_A, "twin: two intermediates, as the path length allows", _depth_two),
    "T12-path-length": (_H, "one more intermediate than allowed", _path_length_exceeded),
    "T12-issuer-not-ca": (_H, "an intermediate without the CA bit", _issuer_not_ca),
    "T12-leaf-as-issuer": (_H, "signed with a workload's own leaf", _leaf_as_issuer),
    "T12-depth-50": (_H, "fifty intermediates", _deep),
    "T12-cycle": (_H, "two authorities that signed each other", _cycle),
    "T12-few-constraints": (_A, "twin: 10 constraints on 10 names", _many_constraints(10, 10)),
    "T12-constraints": (_H, "1,100 constraints on 1,100 names", _many_constraints(_MANY, _MANY)),
    "T12-constraints-10000": (_H, "10,000 constraints, over 100 KB", _many_constraints(_TOO_MANY, 1)),
    "T13-missing": (_H, "without the intermediate", _sent(itself=False)),
    "T13-unrelated-after": (_A, "twin: an unrelated authority as well", _sent(after=["stranger"])),
    "T13-unrelated-before": (_A, "twin: the unrelated one first", _sent(before=["stranger"])),
    "T13-root-as-well": (_A, "twin: the root is sent too", _sent(after=["root"])),
    "T13-wrong-order": (_A, "twin: the intermediates the wrong way round", _wrong_order),
    "T13-cross-signed": (_A, "twin: also signed by a stranger", _sent(after=["by stranger"])),
    "T13-cross-signed-first": (
        _H,
        "the stranger's first: gRPC tries no second path",
        _sent(before=["by stranger"]),
    ),
    "T13-expired-as-well": (_A, "twin: an older, expired one as well", _sent(after=["expired"])),
    "T13-expired-first": (_H, "the expired one first: the same", _sent(before=["expired"])),
    "T13-expired-only": (_H, "only the expired one", _sent(before=["expired"], itself=False)),
}

CHAINS: Final = tuple(WrongCertificate(name, *case) for name, case in _CASES.items())
