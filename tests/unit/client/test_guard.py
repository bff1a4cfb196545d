"""What a service asks of a connection before it looks at a token."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from carnet.grpc.guard import Guard, StreamEnd
from carnet.grpc.refusals import Refusal, RefusedError
from carnet.grpc.rules import allow_any_scope
from carnet.testing import CertificateAuthority

METADATA = [("authorization", "Bearer token")]


@pytest.mark.parametrize(("version", "is_accepted"), [([b"TLSv1.3"], True), ([b"TLSv1.2"], False), ([b""], False)])
def test_t20_a_connection_below_tls_1_3_is_refused(version: list[bytes], is_accepted: bool) -> None:
    """Python cannot tell gRPC to take 1.3 only, so each call is asked; where gRPC does not tell, nothing is known."""
    leaf = CertificateAuthority.create().issue("spiffe://prod.example/ns/shop/sa/orders").leaf
    peer = {"x509_pem_cert": [leaf.public_bytes(Encoding.PEM)]}
    guard = Guard({"/shop.Payments/Charge": allow_any_scope()}, stream=StreamEnd.TOKEN)
    now = datetime.now(UTC)
    assert leaf == guard.presented(METADATA, peer, now=now).certificate
    if is_accepted:
        assert leaf == guard.presented(METADATA, {**peer, "ssl_tls_version": version}, now=now).certificate
    else:
        with pytest.raises(RefusedError) as caught:
            guard.presented(METADATA, {**peer, "ssl_tls_version": version}, now=now)
        assert Refusal.INVALID_TOKEN is caught.value.refusal
