"""The audit record of a call that was refused before a service saw it."""

from __future__ import annotations

from datetime import datetime

from carnet.errors import CarnetError
from carnet_broker.core.ledger import RefusalRecord
from carnet_broker.core.workload import UnauthenticatedError, Workload
from carnet_broker.issuance import RefusedError

__all__ = ["refusal_record"]


def refusal_record(error: CarnetError, workload: Workload | None, peer: str, at: datetime) -> RefusalRecord:
    """Return the record. A caller that is not authenticated has no subject: all of them share one part of the record.

    `peer`: the address of the other side, as gRPC writes it.
    """
    match error:
        case UnauthenticatedError():
            reason, detail = str(error.reason), error.detail
        case RefusedError(refusal=refusal):
            reason, detail = str(refusal.reason), refusal.message
        case _:
            reason, detail = error.code, str(error)
    return RefusalRecord(
        at=at,
        reason=reason,
        subject=str(workload.spiffe_id) if workload is not None else "",
        certificate=workload.thumbprint if workload is not None else "",
        peer=peer,
        detail=detail,
    )
