"""A process that writes audit records until it is stopped, for tests that kill it or limit it.

``python ledger_process.py DIRECTORY DURABILITY NAME FILE_LIMIT`` prints ``NAME-0``, ``NAME-1``... each once it is
recorded, or ``refused: why`` where it could not be. FILE_LIMIT is RLIMIT_FSIZE in bytes, empty for none.
"""

from __future__ import annotations

import resource
import sys
import time
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

from carnet_broker.core.ledger import IssueRecord
from carnet_broker.edges.ledger.json_lines import JsonLinesAudit, LedgerLimits
from carnet_broker.ports import AuditUnavailableError


def main(directory: str, durability: str, name: str, file_limit: str) -> None:
    """Write one record after another."""
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_limit), int(file_limit)))
    limits = LedgerLimits(pause=timedelta(milliseconds=50))
    audit = JsonLinesAudit(Path(directory), durability=durability, limits=limits)
    now = datetime.now(UTC)
    for number in count():
        record = IssueRecord(
            at=now,
            token_id=f"{name}-{number}",
            kid="k",
            subject="spiffe://prod.example/a",
            audience="payments",
            scopes=("charge",),
            expires_at=now,
            certificate="c",
            policy="p",
        )
        try:
            audit.issue([record])
        except AuditUnavailableError as error:
            print(f"refused: {error}", flush=True)
            time.sleep(0.02)
        else:
            print(record.token_id, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
