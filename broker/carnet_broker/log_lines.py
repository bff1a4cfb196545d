"""How much of the log one source may fill. A stranger can be refused as fast as the network goes.

What is left out is counted: a metric says so, and a line each second while it goes on. The other metrics count every
call, logged or not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from carnet_broker.core.admission import Admission

__all__ = ["LibraryLines", "LineLimit"]

_BURST_SECONDS: Final = 4
_QUOTES_METADATA: Final = "Invalid encoding on"


class LineLimit:
    """Lets each source write so many lines a second, and counts the others. Thread-safe."""

    def __init__(self, per_second: int = 10, *, mono: Callable[[], float] = time.monotonic) -> None:
        """`per_second`: lines of one source; a burst is four times as many. `mono`: monotonic seconds."""
        self._mono = mono
        self._lock = threading.Lock()
        self._admission = Admission(rate=per_second, burst=_BURST_SECONDS * per_second, capacity=4096)
        self._left_out = 0

    def admits(self, source: str) -> bool:
        """Say whether `source` may write a line now."""
        with self._lock:
            admitted = self._admission.admit(source, 1, self._mono()) is None
            self._left_out += not admitted
        return admitted

    def take_left_out(self) -> int:
        """Return how many lines were left out since the last time."""
        with self._lock:
            left_out, self._left_out = self._left_out, 0
        return left_out


class LibraryLines(logging.Filter):
    """What libraries log: each logger is one source.

    gRPC logs metadata that is not UTF-8 word for word, with all that a peer put in: a token, for instance. These lines
    are left out; the call itself is logged like any other.
    """

    def __init__(self, limit: LineLimit) -> None:
        super().__init__()
        self._limit = limit

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether `record` goes into the log."""
        return not str(record.msg).startswith(_QUOTES_METADATA) and self._limit.admits(record.name)
