"""The thread that drives the keyring: polls Vault, and looks at once when somebody asks.

A round in which only the shared store failed is one in which Vault answered: it is told of as such.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Final, Protocol

from carnet.errors import CarnetError
from carnet_broker.core.keyring import Keyring, KeyState
from carnet_broker.ports import Clock, Joined, KeyStoreUnavailableError, SessionChange, StoreUnavailableError
from carnet_broker.rotation import RotationDriver, RotationProgress

__all__ = ["KeyringLoop", "UnknownKeyError", "VaultEvents"]

_ASK_AGAIN_AFTER: Final = 1.0
"""Seconds for which what the last look at Vault brought, a failure too, is new enough for whoever asks for a look."""
_ASK_WITHIN: Final = 2.0
"""Seconds that whoever asks for a look waits for it: a Vault that hangs is as good as one that does not answer."""
_SOON: Final = 0.02
"""Seconds; the shortest pause between two rounds, so that a plan that is always due cannot spin."""


class UnknownKeyError(CarnetError):
    """The keyring has no key of the name that is to be revoked."""

    code = "UNKNOWN_KEY"


class VaultEvents(Protocol):
    """Who wants to hear whether Vault answers, and the store where the keyring needs it: logs and metrics."""

    def vault_answered(self) -> None:
        """Tell that a round went well."""

    def vault_failed(self, error: Exception) -> None:
        """Tell that a round failed. What was loaded before stays in force."""

    def rotation_without_store(self, error: StoreUnavailableError | None) -> None:
        """Tell that a round could not do what needs the shared store; None: that it could."""


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
        self._revocations: list[tuple[str, Future[Keyring]]] = []
        self._over = False
        self._looked: tuple[float, bool] | None = None
        """When the last round that has ended began, by the monotonic clock, and whether it went well."""
        self._failing = False
        self._without_store = False
        self._thread = threading.Thread(target=self._run, name="carnet-keyring", daemon=True)

    @property
    def failing(self) -> bool:
        """Whether the last round of the thread failed."""
        return self._failing

    @property
    def without_store(self) -> bool:
        """Whether the last round could not do what needs the shared store."""
        return self._without_store

    @property
    def progress(self) -> RotationProgress | None:
        """How the last round that read the document left the keyring, None before the first."""
        return self._driver.progress

    def round(self, *, revoke: Sequence[str] = ()) -> float:
        """Do one round in the calling thread, and return the seconds until the next. Raises what the round raises.

        `revoke` are keys to stop trusting in it.
        """
        began = self._clock.mono()  # What it has read is at least as new as that.
        until, trouble = None, None
        try:
            until = self._driver.tick(self._clock, revoke=revoke)
        except StoreUnavailableError as error:
            trouble = error
        self._without_store = trouble is not None
        self._events.rotation_without_store(trouble)
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

    def wake(self) -> None:
        """Begin a round now, or when the one under way is over. Any thread may ask."""
        self._wake.set()

    def hear(self, changes: Iterable[SessionChange]) -> None:
        """Begin a round where a verifier that the rotation waits for has acknowledged something, or has left."""
        progress = self.progress
        if progress is None or not progress.laggards:
            return
        awaited = {(session.spiffe_id, session.instance_id) for session in progress.laggards}
        if any(not isinstance(one, Joined) and (one.spiffe_id, one.instance_id) in awaited for one in changes):
            self.wake()

    def revoke_key(self, kid: str) -> Future[Keyring]:
        """Stop trusting a key at once, and return what becomes of the keyring. Any thread may ask.

        The future raises `UnknownKeyError` for a key that is not in the keyring, and `KeyStoreUnavailableError`, or
        what else a round raises, where the key may be trusted still: then it is not tried again.
        """
        revoked: Future[Keyring] = Future()
        with self._lock:
            if self._over:
                revoked.set_exception(_ended())
                return revoked
            self._revocations.append((kid, revoked))
        self._wake.set()
        return revoked

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
                revocations, self._revocations = self._revocations, []
            began, pause = self._clock.mono(), self._poll_interval
            failure: Exception | None = None
            revocations = [(kid, future) for kid, future in revocations if future.set_running_or_notify_cancel()]
            try:
                pause = self.round(revoke=[kid for kid, _ in revocations])
            except Exception as error:  # noqa: BLE001 - reported; a fault of one round must not end all rotation
                failure = error
                self._failing = True
                self._looked = began, False
                self._events.vault_failed(error)
            else:
                self._failing = False
                self._events.vault_answered()
            _answer(asked, answered=not self._failing)
            for kid, revoked in revocations:
                self._tell(kid, revoked, failure)
            self._wake.wait(pause)
            self._wake.clear()
        with self._lock:
            asked, self._asked, self._over = self._asked, [], True
            revocations, self._revocations = self._revocations, []
        _answer(asked, answered=False)
        for _, revoked in revocations:
            if revoked.set_running_or_notify_cancel():
                revoked.set_exception(_ended())

    def _tell(self, kid: str, revoked: Future[Keyring], failure: Exception | None) -> None:
        """Tell whoever wants `kid` revoked what is in force now; a round may fail in something else."""
        keyring = self._driver.keyring
        key = keyring.get(kid) if keyring is not None else None
        if keyring is not None and key is not None and key.state is KeyState.REVOKED:
            revoked.set_result(keyring)
        elif failure is not None:
            revoked.set_exception(failure)
        elif key is None:
            revoked.set_exception(UnknownKeyError(f"the keyring has no key {kid:.80}"))
        else:
            revoked.set_exception(KeyStoreUnavailableError(f"key {kid} was not revoked: too many other steps were due"))


def _ended() -> KeyStoreUnavailableError:
    return KeyStoreUnavailableError("this broker is shutting down; ask another one")


def _answer(asked: Iterable[Future[bool]], *, answered: bool) -> None:
    for future in asked:
        if future.set_running_or_notify_cancel():
            future.set_result(answered)
