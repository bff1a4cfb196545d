"""How much of the log one source may fill. A stranger can be refused as fast as the network goes.

What is left out is counted, and whoever holds the limit says so in the log.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from carnet.admission import Admission

__all__ = ["LineLimit"]

_BURST_SECONDS: Final = 4


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
