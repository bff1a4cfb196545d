"""How much of the log libraries may fill.

What is left out is counted: a metric says so, and a line each second while it goes on. The other metrics count every
call, logged or not.
"""

from __future__ import annotations

import logging
from typing import Final

from carnet.log_lines import LineLimit

__all__ = ["LibraryLines"]

_QUOTES_METADATA: Final = "Invalid encoding on"


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
