"""Refusals: recorded when there is room for them, counted when there is not.

Whoever is refused can ask again as fast as the network goes, so refusals are the one thing here that a stranger can
make many of. They are capped per identity, held in a short queue, written by a thread that no caller waits for, to
files of their own, and only while the disk has more room than is kept for issues.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from carnet.admission import Admission
from carnet_broker.core.ledger import DroppedRecord, RefusalRecord
from carnet_broker.edges.ledger.files import LedgerFile

__all__ = ["RefusalFiles"]

_MAX_WAITING: Final = 1000
_SYNC_EVERY: Final = 1.0
_RETRY_AFTER: Final = 1.0


class RefusalFiles:
    """Takes refusals from any thread, and writes them from one."""

    def __init__(
        self,
        directory: Path,
        *,
        per_second: float,
        reserve_bytes: int,
        max_file_bytes: int,
        new_file: Callable[[], LedgerFile],
    ) -> None:
        """`per_second`: refusals of one identity; a burst is four times as many. Nothing is opened yet."""
        self._directory = directory
        self._reserve_bytes = reserve_bytes
        self._max_file_bytes = max_file_bytes
        self._new_file = new_file
        self._lock = threading.Lock()
        self._admission = Admission(rate=per_second, burst=max(round(4 * per_second), 1), capacity=4096)
        self._waiting: list[RefusalRecord] = []
        self._dropped = 0
        self._dropped_since: datetime | None = None
        self._file: LedgerFile | None = None
        self._synced_at = float("-inf")
        self._dirty = False
        self._not_before = float("-inf")

    def add(self, record: RefusalRecord, mono: float) -> None:
        """Take one refusal, or count it as dropped."""
        with self._lock:
            if self._admission.admit(record.subject, 1, mono) is None and len(self._waiting) < _MAX_WAITING:
                self._waiting.append(record)
            else:
                self._drop(1, record.at)

    def write(self, now: datetime, mono: float) -> OSError | None:
        """Write what was taken; return why it had to be dropped instead, None where all is well."""
        if mono < self._not_before:
            return None
        with self._lock:
            records, self._waiting = self._waiting, []
            dropped, self._dropped = self._dropped, 0
            since, self._dropped_since = self._dropped_since, None
        lines = [record.to_line() for record in records]
        if since is not None:
            lines.append(DroppedRecord(now, since, dropped).to_line())
        try:
            if lines:
                self._append(b"".join(lines), now)
            if self._file is not None and self._dirty and mono - self._synced_at >= _SYNC_EVERY:
                self._file.sync()
                self._synced_at, self._dirty = mono, False
        except OSError as error:
            self.close()
            self._not_before = mono + _RETRY_AFTER
            with self._lock:
                self._drop(len(records) + dropped, since or now)
            return error
        return None

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.sync()
            self._file.close()
            self._file = None

    def _append(self, data: bytes, now: datetime) -> None:
        room = os.statvfs(self._directory)
        if room.f_bavail * room.f_frsize < self._reserve_bytes + len(data):
            raise OSError(errno.ENOSPC, "the room that is left is kept for issues", str(self._directory))
        if self._file is None or self._file.is_due(now, self._max_file_bytes):
            self.close()
            self._file = self._new_file()
        self._file.append(data)
        self._dirty = True

    def _drop(self, count: int, since: datetime) -> None:
        self._dropped += count
        if self._dropped_since is None or since < self._dropped_since:
            self._dropped_since = since
