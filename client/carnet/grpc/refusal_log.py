"""The lines about refused calls in the log of a server: each caller has its part, and no more.

Every caller with a certificate of the mesh can be refused as fast as the network goes. So each may fill ten lines a
second, with bursts of four times as many. What is left out is counted, and told with the next line that goes out, once
a second at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from carnet.grpc.refusals import RefusedError
from carnet.log_lines import LineLimit

__all__ = ["RefusalLog"]

_log: Final = logging.getLogger("carnet.grpc")
_TELL_EVERY: Final = 1.0


class RefusalLog:
    """The log of one interceptor. Thread-safe."""

    def __init__(self, *, mono: Callable[[], float] = time.monotonic) -> None:
        self._mono = mono
        self._limit = LineLimit(mono=mono)
        self._lock = threading.Lock()
        self._tell_from = float("-inf")

    def refused(self, method: str, caller: str, error: RefusedError) -> None:
        """Write why `caller` was refused `method`, within its part of the log."""
        if not self._limit.admits(caller):
            return
        _log.warning("refused %r to %s: %s", method, caller, error)
        if left_out := self._take_left_out():
            _log.warning("left out %d lines about refused calls: too many of one caller", left_out)

    def _take_left_out(self) -> int:
        with self._lock:
            now = self._mono()
            if now < self._tell_from:
                return 0
            left_out = self._limit.take_left_out()
            if left_out:
                self._tell_from = now + _TELL_EVERY
        return left_out
