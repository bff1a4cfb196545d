from __future__ import annotations

from datetime import UTC, datetime

import pytest

from carnet.errors import CarnetError
from carnet.spiffe import SpiffeID
from carnet.testing import CertificateAuthority
from carnet_broker.core.ledger import RefusalRecord
from carnet_broker.core.unauthenticated import IdentityReason, UnauthenticatedError
from carnet_broker.core.workload import Workload
from carnet_broker.edges.grpc.refused_calls import refusal_record
from carnet_broker.edges.grpc.status import SlowRequestError
from carnet_broker.issuance import Refusal, RefusalReason, RefusedError

AT = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
PEER = "ipv4:192.0.2.1:40000"
ORDERS = "spiffe://prod.example/ns/shop/sa/orders"


@pytest.mark.parametrize(
    ("error", "reason", "detail"),
    [
        (RefusedError(Refusal(RefusalReason.TOO_MANY_REQUESTS, "too many")), "TOO_MANY_REQUESTS", "too many"),
        (SlowRequestError("nothing came"), "SLOW_REQUEST", "nothing came"),
    ],
)
def test_a_workload_that_is_refused_is_on_record_by_name_and_certificate(error: CarnetError, reason: str, detail: str):
    """With the code that it was told."""
    leaf = CertificateAuthority.create().issue(ORDERS).leaf
    workload = Workload(SpiffeID.parse(ORDERS), "thumbprint", leaf, leaf.not_valid_after_utc)
    expected = RefusalRecord(AT, reason, subject=ORDERS, certificate="thumbprint", peer=PEER, detail=detail)

    assert expected == refusal_record(error, workload, PEER, AT)


def test_a_caller_that_is_nobody_is_on_record_by_its_address():
    """With the reason that only we are told."""
    error = UnauthenticatedError(IdentityReason.EXPIRED, "it ended yesterday")

    assert RefusalRecord(AT, "EXPIRED", peer=PEER, detail="it ended yesterday") == refusal_record(error, None, PEER, AT)
