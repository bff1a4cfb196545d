"""The rotation driver: reads the keyring and the requests in Vault, and takes the steps that `core.keyring.plan` names.

Any replica may take any step. Each step is one check-and-set write of the document: the loser of a race has changed
nothing, reads again and plans again. What a crash leaves behind is finished by whoever comes next, because the plan
follows from the document alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, Protocol

from carnet_broker.core.keyring import (
    ActivateKey,
    CreateKey,
    DestroyKey,
    KeyRecord,
    Keyring,
    PublishKey,
    RemoveKey,
    RevokeKey,
    Step,
    Timing,
    Wait,
    Wish,
    check_succession,
    plan,
)
from carnet_broker.core.keyring_document import keyring_of_content, keyring_to_content
from carnet_broker.core.requests import RequestKind, RequestStatus, RotationRequest, judge, wish_of
from carnet_broker.ports import (
    DocumentConflictError,
    KeyLostError,
    KeyringDocument,
    KeyStore,
    RotationRequests,
    Signer,
    StoredKey,
)
from carnet_broker.signing import KeyringHolder, KeyringView

__all__ = ["RotationDriver", "RotationEvents"]

_MAX_STEPS: Final = 16
"""More steps than any plan needs at once; a round that takes more is ended, and the next one goes on."""
_KEEP_ANSWERED: Final = timedelta(days=7)
_SWEEP_EVERY: Final = timedelta(hours=1)
_ANSWERS_KEPT: Final = 100


class RotationEvents(Protocol):
    """Who wants to hear what the driver does: logs and metrics."""

    def step_taken(self, step: Step, keyring: Keyring) -> None:
        """Tell that `step` was written, and `keyring` is the result."""

    def key_lost(self, kid: str, error: KeyLostError) -> None:
        """Tell that the private key of `kid` cannot be used any more."""


class RotationDriver:
    """Drives one keyring. Not thread-safe: one thread calls `tick`."""

    def __init__(
        self,
        *,
        document: KeyringDocument,
        store: KeyStore,
        requests: RotationRequests,
        holder: KeyringHolder,
        events: RotationEvents,
        issuer: str,
        store_name: str,
        timing: Timing,
    ) -> None:
        self._document = document
        self._store = store
        self._requests = requests
        self._holder = holder
        self._events = events
        self._issuer = issuer
        self._store_name = store_name
        self._timing = timing
        self._version = 0
        self._signers: dict[str, Signer] = {}
        self._unplaced: list[StoredKey] = []
        self._swept_at: datetime | None = None

    def tick(self, now: datetime, mono: float) -> datetime | None:
        """Read, plan and act until there is nothing to do; return when there will be (None: when somebody asks).

        Raises `KeyStoreUnavailableError`, `InvalidKeyringError` or `KeyringRegressionError`; the view in force then
        stays as it is, unconfirmed.
        """
        keyring = self._load(now, mono)
        pending = self._requests.pending()
        until: datetime | None = None
        for _ in range(_MAX_STEPS):
            wish = wish_of(pending, keyring, timing=self._timing)
            step = self._plan(keyring, now, wish)
            if isinstance(step, Wait):
                until = step.until
                break
            try:
                keyring = self._take(step, keyring, pending, now, mono)
            except DocumentConflictError:
                keyring = self._load(now, mono)
        else:
            until = now
        for request in pending:
            result = judge(request, keyring, timing=self._timing)
            if result != request.result:
                self._requests.answer(request, result)
        if self._swept_at is None or now - self._swept_at > _SWEEP_EVERY:
            self._requests.sweep(before=now - _KEEP_ANSWERED)
            self._swept_at = now
        return until

    def _plan(self, keyring: Keyring, now: datetime, wish: Wish) -> Step | Wait:
        """Plan with what is known of the other replicas: that each serves a document `replica_lag` after its write."""
        standby = keyring.standby
        served_since = None
        if standby is not None and standby.published_at is not None:
            served_since = standby.published_at + self._timing.replica_lag
        return plan(keyring, now=now, timing=self._timing, served_since=served_since, wish=wish)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _load(self, now: datetime, mono: float) -> Keyring:
        """Read the document, and put it in force where it is new."""
        document = self._document.load()
        view = self._holder.view
        if document is None:
            keyring, self._version = Keyring(issuer=self._issuer), 0
        else:
            keyring = keyring_of_content(document.content, issuer=self._issuer, store=self._store_name)
            self._version = document.version
        if view is not None:
            check_succession(view.keyring, keyring)
        if keyring.generation > 0:
            self._adopt(keyring, now, mono)
        self._destroy_unplaced(keyring)
        return keyring

    def _adopt(self, keyring: Keyring, now: datetime, mono: float) -> None:
        """Put `keyring` in force, with the signers of the key that signs and of the one that will."""
        view = self._holder.view
        complete = view is not None and (view.signer is not None or view.key is None)
        if view is not None and view.keyring == keyring and complete:
            self._holder.confirm(now, mono)
            return
        signers: dict[str, Signer] = {}
        for record in (keyring.active, keyring.standby):
            if record is None:
                continue
            try:
                signers[record.kid] = self._signer(record)
            except KeyLostError as error:
                self._events.key_lost(record.kid, error)
        self._signers = signers
        active = keyring.active
        self._holder.adopt(
            KeyringView(
                keyring=keyring,
                key=active,
                signer=signers.get(active.kid) if active is not None else None,
                jwks=keyring.key_set().to_json() if keyring.published else "",
                confirmed_at=now,
                confirmed_mono=mono,
            )
        )

    def _signer(self, record: KeyRecord) -> Signer:
        """Return the signer of `record`, proven to be its key."""
        known = self._signers.get(record.kid)
        return known if known is not None else self._store.signer(_stored(record))

    # -- acting ----------------------------------------------------------------------------------------------------

    def _take(
        self, step: Step, keyring: Keyring, pending: Sequence[RotationRequest], now: datetime, mono: float
    ) -> Keyring:
        """Carry out `step` and write its result. Raises `DocumentConflictError` where somebody else was first."""
        created: StoredKey | None = None
        try:
            if isinstance(step, CreateKey):
                created = self._store.create()
                changed = keyring.with_created(created.jwk, created.version, now)
            else:
                changed = self._changed(step, keyring, pending, now)
        except KeyLostError as error:
            kid = getattr(step, "kid", "")
            self._events.key_lost(kid, error)
            # A key that nobody can sign with must not be published or activated: give it up, and plan anew.
            step, changed = RevokeKey(kid), keyring.with_revoked(kid, now, self._timing)
        if created is not None:
            # Until the document names it, the key is nobody's: if the write fails, the next reading tells whether to
            # destroy it.
            self._unplaced.append(created)
        content = keyring_to_content(changed, store=self._store_name)
        self._version = self._document.replace(content, expected_version=self._version)
        self._unplaced = [key for key in self._unplaced if changed.get(key.jwk.kid) is None]
        self._events.step_taken(step, changed)
        self._adopt(changed, now, mono)
        return changed

    def _changed(self, step: Step, keyring: Keyring, pending: Sequence[RotationRequest], now: datetime) -> Keyring:
        """Return what `keyring` becomes by `step`, having done what must come before the write."""
        match step:
            case PublishKey(kid):
                self._signer(_required(keyring, kid))
                return keyring.with_published(kid, now)
            case ActivateKey(kid):
                self._signer(_required(keyring, kid))
                answers = [
                    request.request_id
                    for request in pending
                    if request.kind is not RequestKind.REVOKE
                    and judge(request, keyring, timing=self._timing).status is RequestStatus.ACCEPTED
                ]
                return keyring.with_activated(kid, now, self._timing, answers=answers[:_ANSWERS_KEPT])
            case RemoveKey(kid):
                return keyring.with_removed(kid, now)
            case RevokeKey(kid):
                return keyring.with_revoked(kid, now, self._timing)
            case DestroyKey(kid):
                self._store.destroy(_stored(_required(keyring, kid)), live=[_stored(key) for key in keyring.live])
                return keyring.with_destroyed(kid, now)
            case CreateKey():  # pragma: no cover - made by _take, which must keep the new key at hand
                raise AssertionError(step)

    def _destroy_unplaced(self, keyring: Keyring) -> None:
        """Destroy the keys that this replica made and that lost the race for the document."""
        live = [_stored(key) for key in keyring.live]
        while self._unplaced:
            key = self._unplaced[-1]
            if keyring.get(key.jwk.kid) is None:
                self._store.destroy(key, live=live)
            self._unplaced.pop()


def _stored(record: KeyRecord) -> StoredKey:
    return StoredKey(jwk=record.jwk, version=record.version)


def _required(keyring: Keyring, kid: str) -> KeyRecord:
    record = keyring.get(kid)
    if record is None:
        msg = f"key {kid} is not in the keyring"
        raise ValueError(msg)
    return record
