"""A guard that ends whatever reaches outside of the process: files, sockets, names, programs.

It listens to the interpreter's audit events (PEP 578), so it also sees what a library does below Python.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_OUTSIDE = ("open", "os.", "socket.", "subprocess.", "urllib.", "ctypes.", "sqlite3.", "ftplib.", "http.", "import")
_sealed = False


class ReachedOutsideError(AssertionError):
    """Code under the seal asked the operating system for something."""


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _sealed and event.startswith(_OUTSIDE):
        msg = f"reached outside: {event} {arguments!r:.200}"
        raise ReachedOutsideError(msg)


sys.addaudithook(_listen)  # For good: a hook cannot be removed, so it is one, and asleep.


@contextmanager
def sealed() -> Iterator[None]:
    """Raise `ReachedOutsideError` for every file, socket, look-up or program that is asked for within."""
    global _sealed  # noqa: PLW0603 - the hook is one for the process
    _sealed = True
    try:
        yield
    finally:
        _sealed = False
