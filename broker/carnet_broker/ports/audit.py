"""The port to the audit record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from carnet.errors import CarnetError
from carnet_broker.core.ledger import DurableRecord, RefusalRecord

__all__ = ["AuditSink", "AuditUnavailableError"]


class AuditUnavailableError(CarnetError):
    """A record could not be made durable, so nothing may be issued."""

    code = "AUDIT_UNAVAILABLE"
    retryable = True


class AuditSink(Protocol):
    """Where every issue and every refusal is recorded before the caller hears of it."""

    def issue(self, records: Sequence[DurableRecord]) -> None:
        """Make the intents to issue durable before returning: those of one call together, which costs what one costs.

        Raises `AuditUnavailableError`; then nothing is issued, although some of the intents may stand in the record.
        """

    def refusal(self, record: RefusalRecord) -> None:
        """Record a refusal; it may be dropped and counted, never raises, and never takes the space of an issue."""

    def close(self) -> None:
        """Write out what is held, and release the file."""
