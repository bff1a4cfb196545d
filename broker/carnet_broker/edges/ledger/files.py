"""The files of the ledger: made, appended to, made durable, and mended after a crash.

A file belongs to the process that made it, which holds a lock on it for as long as it writes. Its name is
``issued-`` or ``refused-``, the UTC time, a random part, ``.jsonl``: names sort by time. It is only ever appended to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

__all__ = ["LedgerFile", "mend"]

_NAME: Final = re.compile(r"(issued|refused)-[0-9]{8}T[0-9]{6}\.[0-9]{6}Z-[0-9a-f]{16}\.jsonl")
_BLOCK: Final = 64 * 1024


class LedgerFile:
    """One file that this process appends to. For one thread at a time. Every method raises `OSError`."""

    def __init__(
        self, directory: Path, kind: str, *, now: datetime, first_line: bytes, sync: Callable[[int], None]
    ) -> None:
        """Make a new file in `directory`, durable with its first line. `kind`: ``issued`` or ``refused``.

        A file that cannot take its first line is removed again.
        """
        self.path = directory / f"{kind}-{now.astimezone(UTC):%Y%m%dT%H%M%S.%f}Z-{secrets.token_hex(8)}.jsonl"
        self._day = now.astimezone(UTC).date()
        self._size = 0
        self._sync = sync
        # O_EXCL: neither another's file nor a symbolic link is ever written to.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            self.append(first_line)
            self.sync()
            _sync_directory(directory)
        except OSError:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.close()
            raise

    def is_due(self, now: datetime, max_bytes: int) -> bool:
        """Say whether the next record belongs into a new file: another UTC day, or this one is full."""
        return self._size >= max_bytes or self._day != now.astimezone(UTC).date()

    def append(self, data: bytes) -> None:
        """Hand `data` to the kernel. After an error part of it may be there: the file must not be used again."""
        view = memoryview(data)
        while view:
            written = os.write(self._descriptor, view)
            self._size += written
            view = view[written:]

    def sync(self) -> None:
        """Make all that was appended durable. After an error nothing is known: the file must not be used again."""
        self._sync(self._descriptor)
        if os.fstat(self._descriptor).st_nlink == 0:
            raise OSError(errno.ENOENT, "the file was deleted while it was written to", str(self.path))

    def close(self) -> None:
        """Let go of the file; it stays."""
        with contextlib.suppress(OSError):  # Whatever close could still tell, the last sync told already.
            os.close(self._descriptor)


def mend(directory: Path) -> Iterator[tuple[Path, int]]:
    """Cut the torn last line off each file whose writer is gone; yield the file and how many bytes were cut.

    A torn line was never durable as a record, so nobody was told that it is. Files of other names, those of writers
    that live, and those that this process may not write to are left alone.
    """
    for path in sorted(directory.iterdir()):
        if _NAME.fullmatch(path.name):
            with contextlib.suppress(OSError):
                cut = _mend_file(path)
                if cut:
                    yield path, cut


def _mend_file(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Raises where its writer lives.
        size = os.fstat(descriptor).st_size
        end = _end_of_last_line(descriptor, size)
        if end < size:
            os.ftruncate(descriptor, end)
            os.fsync(descriptor)
        return size - end
    finally:
        os.close(descriptor)


def _end_of_last_line(descriptor: int, size: int) -> int:
    end = size
    while end:
        start = max(end - _BLOCK, 0)
        line_feed = os.pread(descriptor, end - start, start).rfind(b"\n")
        if line_feed >= 0:
            return start + line_feed + 1
        end = start
    return 0


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
