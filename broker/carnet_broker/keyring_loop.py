"""The thread that drives the keyring: polls Vault, and looks at once when somebody asks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from datetime import timedelta
from typing import Final, Protocol

from carnet_broker.ports import Clock
from carnet_broker.rotation import RotationDriver

__all__ = ["KeyringLoop", "VaultEvents"]

_ASK_AGAIN_AFTER: Final = 1.0
"""Seconds for which what the last look at Vault brought, a failure too, is new enough for whoever asks for a look."""
_ASK_WITHIN: Final = 2.0
"""Seconds that whoever asks for a look waits for it: a Vault that hangs is as good as one that does not answer."""
_SOON: Final = 0.02
"""Seconds; the shortest pause between two rounds, so that a plan that is always due cannot spin."""


class VaultEvents(Protocol):
    """Who wants to hear whether Vault answers: logs and metrics."""

    def vault_answered(self) -> None:
        """Tell that a round went well."""

    def vault_failed(self, error: Exception) -> None:
        """Tell that a round failed. What was loaded before stays in force."""


class KeyringLoop:
    """Runs `RotationDriver.tick` again and again in one thread."""

    def __init__(self, driver: RotationDriver, clock: Clock, events: VaultEvents, *, poll_interval: timedelta) -> None:
        self._driver = driver
        self._clock = clock
        self._events = events
        self._poll_interval = poll_interval.total_seconds()
        self._wake = threading.Event()
        self._stopping = False
        self._lock = threading.Lock()
        self._asked: list[Future[bool]] = []
        self._over = False
        self._looked: tuple[float, bool] | None = None
        """When the last round that has ended began, by the monotonic clock, and whether it went well."""
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="carnet-keyring", daemon=True)

    @property
    def failing(self) -> bool:
        """Whether the last round of the thread failed."""
        return self._failing

    def round(self) -> float:
        """Do one round in the calling thread, and return the seconds until the next. Raises what the round raises."""
        began = self._clock.mono()  # What it has read is at least as new as that.
        until = self._driver.tick(self._clock)
        self._looked = began, True
        pause = self._poll_interval
        if until is not None:
            pause = min(pause, (until - self._clock.now()).total_seconds())
        return max(_SOON, pause)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, when the round under way is over."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    async def read_again(self) -> bool:
        """Make sure that the keyring was read within the last second; say whether Vault answered, in time.

        However many ask, Vault is looked at about once a second for it, also while it fails.
        """
        looked = self._looked
        if looked is not None and self._clock.mono() - looked[0] < _ASK_AGAIN_AFTER:
            return looked[1]
        asked: Future[bool] = Future()
        with self._lock:
            if self._over:
                return False
            self._asked.append(asked)
        self._wake.set()
        try:
            async with asyncio.timeout(_ASK_WITHIN):
                return await asyncio.wrap_future(asked)
        except TimeoutError:
            return False

    def _run(self) -> None:
        while not self._stopping:
            with self._lock:
                asked, self._asked = self._asked, []
            began, pause = self._clock.mono(), self._poll_interval
            try:
                pause = self.round()
            except Exception as error:  # noqa: BLE001 - reported; a fault of one round must not end all rotation
                self._failing = True
                self._looked = began, False
                self._events.vault_failed(error)
            else:
                self._failing = False
                self._events.vault_answered()
            _answer(asked, answered=not self._failing)
            self._wake.wait(pause)
            self._wake.clear()
        with self._lock:
            asked, self._asked, self._over = self._asked, [], True
        _answer(asked, answered=False)


def _answer(asked: Iterable[Future[bool]], *, answered: bool) -> None:
    for future in asked:
        if future.set_running_or_notify_cancel():
            future.set_result(answered)
