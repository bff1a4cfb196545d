"""Wake-ups: one thread that listens to the database, and those that wait in this process.

A wake-up is only a hint. It may come for nothing, and may be lost while the connection is down: so there is one when
the connection is back, and whoever waits looks at the store now and then too.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import psycopg
from sqlalchemy.exc import SQLAlchemyError

from carnet.errors import ConfigError
from carnet_broker.edges.store.database import Listener

__all__ = ["StoreWakeups", "WakeupHub"]

_LISTEN_SECONDS: Final = 60.0
_RETRY_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
_LOST: Final = (SQLAlchemyError, psycopg.Error, sqlite3.Error, OSError, ConfigError)


class StoreWakeups:
    """What one thread waits with (`ports.Wakeups`). A wake-up that comes before the wait ends it at once."""

    def __init__(self, leave: Callable[[StoreWakeups], None]) -> None:
        self._leave = leave
        self._woken = threading.Event()
        self._closed = False

    def wait(self, timeout: timedelta) -> bool:
        """Return True when something may have changed since the last wait, False after `timeout` and when closed."""
        woken = self._woken.wait(timeout.total_seconds())
        if not self._closed:
            self._woken.clear()
        return woken and not self._closed

    def wake(self) -> None:
        """End the wait that is under way, or the next one."""
        self._woken.set()

    def close(self) -> None:
        """End the wait that is under way, and each further one at once."""
        self._closed = True
        self._woken.set()
        self._leave(self)


class WakeupHub:
    """Wakes all that wait in this process. Its thread listens from the first that waits to `close`."""

    def __init__(self, listen: Callable[[], Listener]) -> None:
        """`listen` opens a connection that is told of changes; it may raise, and is called again."""
        self._listen = listen
        self._lock = threading.Lock()
        self._waiting: tuple[StoreWakeups, ...] = ()
        self._stopped = threading.Event()
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None

    def open(self) -> StoreWakeups:
        """Return one more to wait with."""
        wakeups = StoreWakeups(self._leave)
        with self._lock:
            self._waiting = (*self._waiting, wakeups)
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._run, name="carnet-store-wakeups", daemon=True)
                self._thread.start()
        return wakeups

    def wake(self) -> None:
        """Wake all."""
        for wakeups in self._waiting:
            wakeups.wake()

    def close(self) -> None:
        """Stop listening, and end each wait."""
        with self._lock:
            self._stopped.set()
            thread, listener = self._thread, self._listener
            if listener is not None:
                listener.interrupt()
        if thread is not None:
            thread.join()
        for wakeups in self._waiting:
            wakeups.close()

    def _leave(self, wakeups: StoreWakeups) -> None:
        with self._lock:
            self._waiting = tuple(waiting for waiting in self._waiting if waiting is not wakeups)

    def _run(self) -> None:
        failures = 0
        while not self._stopped.is_set():
            try:
                listener = self._listen()
            except _LOST:
                self._stopped.wait(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
                failures += 1
                continue
            failures = 0
            if self._adopt(listener):
                self.wake()  # Something may have changed before it listened.
                self._pass_on(listener)
            self._adopt(None)
            listener.close()

    def _adopt(self, listener: Listener | None) -> bool:
        with self._lock:
            self._listener = listener
            return not self._stopped.is_set()

    def _pass_on(self, listener: Listener) -> None:
        try:
            while not self._stopped.is_set():
                if listener.wait(_LISTEN_SECONDS):
                    self.wake()
        except _LOST:
            self.wake()
