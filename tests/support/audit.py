"""Audit sinks for tests: one in memory, and what it takes to look into the files of the real one."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from carnet_broker.core.ledger import IssueRecord, RefusalRecord
from carnet_broker.edges.ledger.json_lines import JsonLinesAudit
from carnet_broker.ports import AuditUnavailableError

__all__ = ["MemoryAudit", "fill_up", "lines_of", "records_in", "wait_for"]


class MemoryAudit:
    """Implements `AuditSink` in memory. Set `failing` and nothing can be recorded."""

    def __init__(self) -> None:
        self.failing = False
        self.issued: list[IssueRecord] = []
        self.refused: list[RefusalRecord] = []
        self._closed = False
        self._lock = threading.Lock()

    def issue(self, records: Sequence[IssueRecord]) -> None:
        """Keep `records`, all or none."""
        with self._lock:
            if self.failing or self._closed:
                msg = "the audit record cannot be written"
                raise AuditUnavailableError(msg)
            self.issued += records

    def refusal(self, record: RefusalRecord) -> None:
        """Keep `record`, unless nothing can be recorded."""
        with self._lock:
            if not self.failing:
                self.refused.append(record)

    def close(self) -> None:
        """Take no more."""
        self._closed = True


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the records in one file; each of its lines must be one."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def records_in(directory: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind in all files of `directory`."""
    return [record for path in sorted(directory.glob("*.jsonl")) for record in lines_of(path) if record["kind"] == kind]


def fill_up(audit: JsonLinesAudit) -> None:
    """Make the disk full for the file that `audit` has open: the kernel's own ENOSPC, from /dev/full."""
    full = os.open("/dev/full", os.O_WRONLY)
    file = audit._file
    assert file is not None
    os.dup2(full, file._descriptor)
    os.close(full)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, at most 10 s."""
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail("it did not come to pass within 10 s")
