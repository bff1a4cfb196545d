"""What this replica holds in memory of the keyring: the set it serves, and the key it signs with.

The rotation driver replaces the view whole; issuing threads and the trust service read it. A reader takes the view
once and works with that one, so nobody sees half a rotation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from carnet.errors import CarnetError
from carnet_broker.core.keyring import KeyRecord, Keyring
from carnet_broker.ports import Signer

__all__ = ["KeyringHolder", "KeyringView", "NoSigningKeyError"]


class NoSigningKeyError(CarnetError):
    """There is no key that this replica may sign with now."""

    code = "NO_SIGNING_KEY"
    retryable = True


@dataclass(frozen=True, slots=True)
class KeyringView:
    """One keyring as this replica loaded it."""

    keyring: Keyring
    key: KeyRecord | None
    """The ACTIVE key, None where there is none yet."""
    signer: Signer | None
    """The signer of `key`, None where its private key could not be loaded."""
    jwks: str
    """The published keys as JSON; empty before the first key is published."""
    confirmed_at: datetime
    """When Vault last said that this is the newest keyring, by the wall."""
    confirmed_mono: float
    """The same on the monotonic clock, in seconds."""

    def age(self, now: datetime, mono: float) -> timedelta:
        """Return how long ago Vault confirmed this view.

        The larger of two clocks: the wall clock may be set back, and the monotonic one stands still in a suspend.
        """
        return max(now - self.confirmed_at, timedelta(seconds=mono - self.confirmed_mono))


class KeyringHolder:
    """Holds the view that is in force. Set by one thread, read by many."""

    def __init__(self, *, island: timedelta, confirm_within: timedelta = timedelta(seconds=60)) -> None:
        """`island` is how long this replica signs without Vault, `confirm_within` how long that is nothing amiss."""
        self._island = island
        self._confirm_within = confirm_within
        self._view: KeyringView | None = None

    @property
    def view(self) -> KeyringView | None:
        """The view in force, None before the first keyring was loaded."""
        return self._view

    def adopt(self, view: KeyringView) -> None:
        """Put `view` in force."""
        self._view = view

    def confirm(self, now: datetime, mono: float) -> None:
        """Note that Vault says the view in force is still the newest."""
        if self._view is not None:
            self._view = replace(self._view, confirmed_at=now, confirmed_mono=mono)

    def is_degraded(self, now: datetime, mono: float) -> bool:
        """Say whether Vault has not confirmed the view lately."""
        return self._view is None or self._view.age(now, mono) > self._confirm_within

    def signing_key(self, now: datetime, mono: float) -> tuple[KeyRecord, Signer]:
        """Return the key to sign with, or raise `NoSigningKeyError`.

        A replica that cannot reach Vault signs for `island` at most: so long its key stays published for its sake.
        """
        view = self._view
        if view is None or view.key is None or view.signer is None or view.key.sign_until is None:
            msg = "no ACTIVE key is loaded"
            raise NoSigningKeyError(msg)
        if now >= view.key.sign_until:
            msg = f"key {view.key.kid} may sign no longer: it was to be replaced before {view.key.sign_until}"
            raise NoSigningKeyError(msg)
        if view.age(now, mono) > self._island:
            msg = f"Vault has not been reached for {self._island}: a later key may be signing, so this one stops"
            raise NoSigningKeyError(msg)
        return view.key, view.signer
