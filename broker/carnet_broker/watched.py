"""Values that come from files which may change: the newest good one is in force, and a bad file never replaces it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from carnet.errors import CarnetError, ConfigError

__all__ = ["ReloadEvents", "Watched"]

Value = TypeVar("Value")


class ReloadEvents(Protocol):
    """Who wants to hear of reloads: logs and metrics."""

    def reloaded(self, what: str) -> None:
        """Tell that the newest file of its kind is in force."""

    def reload_failed(self, what: str, error: CarnetError) -> None:
        """Tell that the newest file cannot be used, and the last good one stays in force."""


class Watched(Generic[Value]):
    """One value, made of one or more files. Replaced whole; read and refreshed by any thread."""

    def __init__(self, what: str, files: Sequence[Path], load: Callable[[], Value], events: ReloadEvents) -> None:
        """Load the first value. Raises what `load` raises: at the start there is no last good one.

        `load` raises `ConfigError` for files that cannot be used.
        """
        self._what = what
        self._files = tuple(files)
        self._load = load
        self._events = events
        # Of two that load at once the one with the older files could end last, and its value would stay.
        self._refreshing = threading.Lock()
        self._seen = self._fingerprint()
        self._failed: str | None = None
        self._value = load()

    @property
    def value(self) -> Value:
        """The value in force."""
        return self._value

    @property
    def is_current(self) -> bool:
        """Whether the newest files are in force."""
        return self._failed is None

    def refresh(self, *, force: bool = False) -> None:
        """Load again where a file has changed (or `force`), and on failure at each call until it is good again.

        Several files are rarely replaced in one go. A pair that is half replaced does not load, and is tried again.
        """
        with self._refreshing:
            seen = self._fingerprint()  # Before the loading: what changes meanwhile is loaded again.
            if seen == self._seen and self._failed is None and not force:
                return
            self._seen = seen
            try:
                self._value = self._load()
            except CarnetError as error:
                self._fail(error)
            except Exception as error:  # noqa: BLE001 - whatever a file brings about, the last good one stays
                self._fail(ConfigError(f"{', '.join(map(str, self._files))}: cannot be loaded: {error!r}"))
            else:
                self._failed = None
                self._events.reloaded(self._what)

    def _fail(self, error: CarnetError) -> None:
        if self._failed != str(error):
            self._events.reload_failed(self._what, error)
        self._failed = str(error)

    def _fingerprint(self) -> tuple[tuple[int, int, int, int] | None, ...]:
        """Return what tells one state of the files from another; follows links, which are swapped on renewal."""
        return tuple(map(_state_of, self._files))


def _state_of(file: Path) -> tuple[int, int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    # The time of change as well: a copy may keep the time of modification, and a lost permission does.
    return found.st_ctime_ns, found.st_mtime_ns, found.st_ino, found.st_size
