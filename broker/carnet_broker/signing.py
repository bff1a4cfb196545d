"""What this replica holds in memory of the keyring: the set it serves, and the key it signs with.

The rotation driver replaces the view whole; issuing threads and the trust service read it. A reader takes the view
once and works with that one, so nobody sees half a rotation.

Rules
-----
1. A replica signs while Vault, or the shared store, has confirmed lately that no later key is ACTIVE.
2. While it can reach neither, it signs for `island` at most: so long a RETIRED key stays published for its sake.
3. Where the store can be reached and does *not* confirm, because a later key may be ACTIVE, it signs for
   `confirm_within` at most, which is time enough to read the later keyring.
4. A keyring that came from the store, without Vault, is served to verifiers. It is signed with only if this replica
   holds the private key already.
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
    """When Vault or the store last said that this is the newest keyring, by the wall."""
    confirmed_mono: float
    """The same on the monotonic clock, in seconds."""
    doubted: bool = False
    """Whether the store knows since then that a later key may be ACTIVE."""

    def age(self, now: datetime, mono: float) -> timedelta:
        """Return how long ago this view was confirmed.

        The larger of two clocks: the wall clock may be set back, and the monotonic one stands still in a suspend.
        """
        return max(now - self.confirmed_at, timedelta(seconds=mono - self.confirmed_mono))


class KeyringHolder:
    """Holds the view that is in force. Set by one thread, read by many."""

    def __init__(self, *, island: timedelta, confirm_within: timedelta = timedelta(seconds=60)) -> None:
        """`island` is how long this replica signs without Vault and store, `confirm_within` how long that is nothing
        amiss, and how long it signs when the store has its doubts.
        """
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
        """Note that Vault, or the store, says the view in force is still the newest."""
        if self._view is not None:
            self._view = replace(self._view, confirmed_at=now, confirmed_mono=mono, doubted=False)

    def doubt(self) -> None:
        """Note that the store knows of a key later than the one of the view, which may be ACTIVE."""
        if self._view is not None and not self._view.doubted:
            self._view = replace(self._view, doubted=True)

    def is_degraded(self, now: datetime, mono: float) -> bool:
        """Say whether the view was not confirmed lately."""
        return self._view is None or self._view.age(now, mono) > self._confirm_within

    def signing_key(self, now: datetime, mono: float) -> tuple[KeyRecord, Signer]:
        """Return the key to sign with, or raise `NoSigningKeyError` where the rules above do not let it sign."""
        view = self._view
        if view is None or view.key is None or view.key.sign_until is None:
            msg = "no ACTIVE key is loaded"
            raise NoSigningKeyError(msg)
        if view.signer is None:
            msg = f"the private key of the ACTIVE key {view.key.kid} is not loaded here"
            raise NoSigningKeyError(msg)
        if now >= view.key.sign_until:
            msg = f"key {view.key.kid} may sign no longer: it was to be replaced before {view.key.sign_until}"
            raise NoSigningKeyError(msg)
        age = view.age(now, mono)
        if age > self._island:
            msg = f"neither Vault nor the store was reached for {self._island}: a later key may sign, so this one stops"
            raise NoSigningKeyError(msg)
        if view.doubted and age > self._confirm_within:
            msg = f"the store knows of a key later than {view.key.kid}, and Vault does not say that it is not ACTIVE"
            raise NoSigningKeyError(msg)
        return view.key, view.signer
