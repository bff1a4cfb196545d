"""The port to the clocks."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

__all__ = ["Clock"]


class Clock(Protocol):
    """The two clocks of the outermost edge; below it, times are arguments."""

    def now(self) -> datetime:
        """Return the wall time, aware UTC."""

    def mono(self) -> float:
        """Return monotonic seconds; it does not go back, and may stand still while the machine sleeps."""
