"""The audit record as JSON lines in files: durable before a token leaves.

A failed write or sync is the end of that file: what of it is on the disk is unknown, and after a failed fsync the
kernel forgets what it could not write. Nothing is issued until a new file has taken its first line. A thread of this
module tries that again and again; callers are refused at once meanwhile.

One thread writes at a time, and each call is a write of its own: `group_commit` is where many become one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final

from carnet.errors import ConfigError
from carnet_broker.core.ledger import DurableRecord, OpenedRecord, RefusalRecord
from carnet_broker.edges.ledger.files import LedgerFile, mend
from carnet_broker.edges.ledger.refusals import RefusalFiles
from carnet_broker.ports import AuditUnavailableError

__all__ = ["Durability", "JsonLinesAudit", "LedgerLimits"]

_LOG: Final = logging.getLogger(__name__)
_TICK: Final = 0.05
_CLOSED: Final = "the audit record is closed: the broker is shutting down"
_HANGING: Final = "the disk of the audit record does not answer"


class Durability(StrEnum):
    """What a record has survived before its token leaves."""

    FSYNC = "fsync"
    """It is on the disk: survives the loss of power."""
    WRITE = "write"
    """The kernel has it: survives the death of this process. On the disk 50 ms later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLimits:
    """The bounds of the ledger."""

    deadline: timedelta = timedelta(seconds=2)
    """How long a caller waits while another one writes, and how long a write takes until the disk counts as hanging.
    The caller that writes waits as long as its write does: no thread can be called back from a disk."""
    pause: timedelta = timedelta(seconds=1)
    """Between a failure and the next try to open a file."""
    max_file_bytes: int = 64 * 1024 * 1024
    """A file that has so many is followed by a new one; so is one of yesterday (UTC)."""
    refusals_per_second: float = 5.0
    """Refusals of one identity that are recorded; four times as many at once."""
    reserve_bytes: int = 64 * 1024 * 1024
    """Room on the disk that refusals leave to issues."""


class JsonLinesAudit:
    """Implements `carnet_broker.ports.AuditSink` with files in one directory. Thread-safe.

    Several processes may share the directory: each has files of its own.
    """

    def __init__(
        self,
        directory: Path,
        *,
        durability: Durability | str = Durability.FSYNC,
        limits: LedgerLimits | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        mono: Callable[[], float] = time.monotonic,
        sync: Callable[[int], None] = os.fdatasync,
    ) -> None:
        """Make `directory` if its parent is there, mend what a crash left, and open the first file.

        Raises `ConfigError` where that cannot be done. `now`, `mono` and `sync` stand for the machine's own.
        """
        limits = limits or LedgerLimits()
        self._directory = directory
        self._sync_each = Durability(durability) is Durability.FSYNC
        self._deadline = limits.deadline.total_seconds()
        self._pause = limits.pause.total_seconds()
        self._max_file_bytes = limits.max_file_bytes
        self._now, self._mono, self._sync = now, mono, sync
        self._trouble: str | None = None
        self._try_again_at = 0.0
        self._dirty = False
        self._lock = threading.Lock()
        self._writing_since: float | None = None
        self._closing = threading.Event()
        self._refusals_fail = False
        self._file: LedgerFile | None = None
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            self._file = self._opened()
        except OSError as error:
            msg = (
                f"{directory}: the audit record cannot be kept there ({error.strerror}); give a directory that this"
                " process may write to, as audit.directory in the configuration"
            )
            raise ConfigError(msg) from error
        self._refusals = RefusalFiles(
            directory,
            per_second=limits.refusals_per_second,
            reserve_bytes=limits.reserve_bytes,
            max_file_bytes=limits.max_file_bytes,
            new_file=lambda: self._new_file("refused"),
        )
        self._thread = threading.Thread(target=self._run, name="carnet-ledger", daemon=True)
        self._thread.start()

    @property
    def writable(self) -> bool:
        """Whether records are taken now, as far as is known."""
        return self._trouble is None and not self._closing.is_set() and not self._hangs

    @property
    def _hangs(self) -> bool:
        """Whether a write has been under way for longer than the deadline."""
        since = self._writing_since
        return since is not None and self._mono() - since > self._deadline

    def issue(self, records: Sequence[DurableRecord]) -> None:
        """Make the intents to issue durable.

        Raises `AuditUnavailableError`: at once while the last failure stands or another caller's write hangs, and after
        the deadline where the file did not become free.
        """
        if self._closing.is_set():
            raise AuditUnavailableError(_CLOSED)
        if self._trouble is not None:
            raise AuditUnavailableError(self._trouble)
        if records:
            self._commit(b"".join([record.to_line() for record in records]), sync=self._sync_each)

    def refusal(self, record: RefusalRecord) -> None:
        """Take a refusal, or count it. It is written within a tenth of a second, where there is room."""
        self._refusals.add(record, self._mono())

    def close(self) -> None:
        """Write out what is held, and release the files. What is issued after that is refused. Twice is once."""
        self._closing.set()
        self._thread.join(timeout=self._deadline)  # A disk that hangs does not keep the process from ending.

    def _commit(self, data: bytes, *, sync: bool) -> None:
        """Write `data`, and sync if `sync`. Raises `AuditUnavailableError`."""
        if self._hangs or not self._lock.acquire(timeout=self._deadline):
            raise AuditUnavailableError(_HANGING)
        try:
            self._writing_since = self._mono()
            failure = self._write(data, sync=sync)
        finally:
            self._writing_since = None
            self._lock.release()
        if failure is not None:
            raise AuditUnavailableError(failure)

    # -- under the lock ------------------------------------------------------------------------------------------------

    def _write(self, data: bytes, *, sync: bool) -> str | None:
        """Write, and return why that failed, None where it did not."""
        if self._trouble is not None and self._mono() < self._try_again_at:
            return self._trouble
        try:
            file = self._current_file()
            file.append(data)
            if sync:
                file.sync()
        except OSError as error:
            return self._fail(error)
        except BaseException:
            self._let_go()  # A record may be half written: no other may follow it in this file.
            raise
        self._dirty = not sync
        if self._trouble is not None:
            _LOG.warning("the audit record in %s is written again", self._directory)
            self._trouble = None
        return None

    def _finish(self) -> None:
        """Sync what was only written, let go of the file, and take no more."""
        if self._file is not None and self._dirty:
            try:
                self._file.sync()
            except OSError as error:
                self._fail(error)
        self._let_go()
        self._trouble, self._try_again_at = _CLOSED, math.inf

    def _current_file(self) -> LedgerFile:
        """Return the file to write to: a new one where it is due, or where the last one failed. Raises `OSError`."""
        file = self._file
        if file is None or file.is_due(self._now(), self._max_file_bytes):
            if file is not None and self._dirty:
                file.sync()
            following = self._opened()
            self._let_go()
            file = self._file = following
        return file

    def _fail(self, error: OSError) -> str:
        """Give up the file that failed, and say why."""
        self._let_go()
        trouble = f"the audit record cannot be written ({error.strerror}): {error.filename or self._directory}"
        if self._trouble is None:
            _LOG.error("%s; nothing is issued until it can", trouble)
        self._trouble = trouble
        self._try_again_at = self._mono() + self._pause
        return trouble

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _opened(self) -> LedgerFile:
        """Mend what broken writers left, this process among them, and return a new file. Raises `OSError`."""
        for path, cut in mend(self._directory):
            _LOG.warning("cut %d bytes of a torn line off %s", cut, path)
        return self._new_file("issued")

    def _new_file(self, kind: str) -> LedgerFile:
        now = self._now()
        opened = OpenedRecord(now, f"{os.uname().nodename} {os.getpid()}")
        return LedgerFile(self._directory, kind, now=now, first_line=opened.to_line(), sync=self._sync)

    # -- in the thread of its own --------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Write refusals, sync what was only written, and try again after a failure; at the end, let go of all."""
        while not self._closing.wait(_TICK):
            self._tick()
        self._refusals.write(self._now(), self._mono())
        self._refusals.close()
        with self._lock:  # However long a write still takes: `close` does not wait for it.
            self._finish()

    def _tick(self) -> None:
        error = self._refusals.write(self._now(), self._mono())
        if error is not None and not self._refusals_fail:
            _LOG.warning("refusals are counted and not recorded: %s", error.strerror)
        self._refusals_fail = error is not None
        failed = self._trouble is not None and self._mono() >= self._try_again_at
        if failed or (self._dirty and not self._sync_each):
            with contextlib.suppress(AuditUnavailableError):  # It is kept as `_trouble`, and logged.
                self._commit(b"", sync=True)
