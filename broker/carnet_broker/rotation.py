"""The rotation driver: reads the keyring and the requests in Vault, and takes the steps that `core.keyring.plan` names.

Any replica may take any step. Each step is one check-and-set write of the document: the loser of a race has changed
nothing, reads again and plans again. What a crash leaves behind is finished by whoever comes next, because the plan
follows from the document alone. One thing cannot be: a private key that was made, and that its maker did not live to
enter into the document. Nobody knows of it, so nobody trusts it.

What cannot be done now does not hold up what can: a letter box that cannot be read, a private key that cannot be loaded
or destroyed, a shared store that does not answer. A key that was revoked stops being served whatever else is amiss.
What failed is raised at the end.

The shared store has a mirror of the document, signed with the keys themselves (`core.mirror`). A document in Vault that
is older than the mirror is not believed. While there is none that can be believed, this replica lives on the mirror: it
serves the keys that are there, and signs while the store confirms its ACTIVE key and it has that key in memory. A
mirror that it cannot check changes nothing.

Each step takes its own look at the clock. A round with a slow Vault lasts long; a key that went into the document with
the time of the round's beginning would sign before every verifier has it, or be removed before its last token is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from carnet_broker.core.keyring import (
    ActivateKey,
    CreateKey,
    DestroyKey,
    Gate,
    KeyRecord,
    Keyring,
    KeyringRegressionError,
    PermitKey,
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
from carnet_broker.core.keyring_document import InvalidKeyringError, keyring_of_content, keyring_to_content
from carnet_broker.core.mirror import MirrorCopy, MirrorNotBelievedError, may_vouch
from carnet_broker.core.requests import RequestKind, RequestStatus, RotationRequest, judge, wish_of
from carnet_broker.core.rollout import VerifierSession
from carnet_broker.ports import (
    Clock,
    DocumentConflictError,
    KeptKeyring,
    KeyLostError,
    KeyringDocument,
    KeyringMirror,
    KeyStore,
    KeyStoreUnavailableError,
    ReplicasSeen,
    Rollout,
    RotationRequests,
    Signer,
    StoredKey,
    StoreUnavailableError,
)
from carnet_broker.rotation_events import RotationEvents, RotationProgress
from carnet_broker.shared_rollout import SharedRollout
from carnet_broker.signing import KeyringHolder, KeyringView

__all__ = ["RotationDriver", "RotationEvents", "RotationProgress"]

_MAX_STEPS: Final = 16
"""More steps than any plan needs at once; a round that takes more is ended, and the next one goes on."""
_KEEP_ANSWERED: Final = timedelta(days=7)
_SWEEP_EVERY: Final = timedelta(hours=1)
_ANSWERS_KEPT: Final = 100


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
        rollout: Rollout,
        mirror: KeyringMirror,
        replicas: Callable[[], ReplicasSeen | None],
        kept: KeptKeyring,
    ) -> None:
        """`replicas` returns what the store last said of the brokers. None, or what is older than a lease, holds up
        every rotation but those of breakglass.
        """
        self._document = document
        self._kept = kept
        self._store = store
        self._requests = requests
        self._holder = holder
        self._events = events
        self._issuer = issuer
        self._store_name = store_name
        self._timing = timing
        self._shared = SharedRollout(
            rollout=rollout, mirror=mirror, replicas=replicas, issuer=issuer, store_name=store_name
        )
        self._version = 0
        self._signers: dict[str, Signer] = {}
        self._lost: frozenset[str] = frozenset()
        self._unplaced: list[StoredKey] = []
        self._trouble: KeyStoreUnavailableError | None = None
        self._swept_at: datetime | None = None
        self._progress: RotationProgress | None = None

    @property
    def keyring(self) -> Keyring | None:
        """The keyring in force here; may be read by any thread."""
        view = self._holder.view
        return None if view is None else view.keyring

    @property
    def progress(self) -> RotationProgress | None:
        """How the last round that read the document left the keyring; may be read by any thread."""
        return self._progress

    def tick(self, clock: Clock, *, revoke: Sequence[str] = ()) -> datetime | None:
        """Read, plan and act until there is nothing to do; return when there will be (None: when somebody asks).

        `revoke` are keys to stop trusting at once, as breakglass asks it. Raises `InvalidKeyringError` or
        `KeyringRegressionError` for a document that is not to be believed, `KeyStoreUnavailableError`, and
        `StoreUnavailableError` where Vault is well and the shared store is not. Where the document could not be read,
        the view in force stays, unless the mirror has a later one.
        """
        self._trouble = None
        self._shared.begin_round()
        keyring = self._load(clock)
        pending = self._pending()
        progress = self._act(keyring, pending, revoke, clock)
        self._progress, keyring, wait = progress, progress.keyring, progress.wait
        self._events.waits(progress)
        laggards = [f"{session.spiffe_id} {session.instance_id}" for session in progress.laggards]
        for request in pending:
            result = judge(request, keyring, timing=self._timing, wait=wait, laggards=laggards)
            if result != request.result:
                self._requests.answer(request, result)
        now = clock.now()
        if self._swept_at is None or now - self._swept_at > _SWEEP_EVERY:
            self._requests.sweep(before=now - _KEEP_ANSWERED)
            self._swept_at = now
        if self._trouble is not None:
            raise self._trouble
        if self._shared.trouble is not None:
            raise self._shared.trouble
        return clock.now() if wait is None else wait.until

    def _act(
        self, keyring: Keyring, pending: Sequence[RotationRequest], revoke: Sequence[str], clock: Clock
    ) -> RotationProgress:
        """Plan and take steps until there are none, or enough were taken."""
        asked = False
        laggards: tuple[VerifierSession, ...] = ()
        gate: Gate | None = None
        for _ in range(_MAX_STEPS):
            wish = wish_of(pending, keyring, timing=self._timing)
            wish = replace(wish, revoke=(*wish.revoke, *revoke))
            gate = self._shared.gate(keyring, clock.now())
            if gate is not None and asked:
                gate = replace(gate, awaiting=True)
            step = self._plan(keyring, clock.now(), gate, wish)
            if isinstance(step, Wait):
                return RotationProgress(keyring, step, gate, laggards)
            if isinstance(step, PermitKey):
                permit, laggards = self._shared.permit(step.kid, overdue=step.overdue)
                if permit is None:
                    asked = True
                else:
                    self._events.permitted(permit, laggards)
                    laggards = ()
                continue
            try:
                keyring = self._take(step, keyring, pending, clock)
            except DocumentConflictError:
                keyring = self._load(clock)
            except StoreUnavailableError:
                continue  # It is noted, and the plan goes on without what needs the store.
        return RotationProgress(keyring, None, gate, laggards)

    def _plan(self, keyring: Keyring, now: datetime, gate: Gate | None, wish: Wish) -> Step | Wait:
        """Plan with what is known of the private keys."""
        active, standby = keyring.active, keyring.standby
        if standby is not None and standby.kid in self._lost:
            return RevokeKey(standby.kid)  # It stands by for nothing: make another while the signer still signs.
        if active is not None and active.kid in self._lost:
            wish = replace(wish, rotate_since=active.activated_at)
        return plan(keyring, now=now, timing=self._timing, gate=gate, wish=wish)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _pending(self) -> Sequence[RotationRequest]:
        """Return the open requests, none where they cannot be read: a rotation that is due does not wait for them."""
        try:
            return self._requests.pending()
        except KeyStoreUnavailableError as error:
            self._trouble = error
            return ()

    def _load(self, clock: Clock) -> Keyring:
        """Read the document, and put it in force where it is new."""
        now, mono = clock.now(), clock.mono()  # Before the reading: what is read is as new as that, or newer.
        # The mirror first: what it has was in Vault before.
        found = self._shared.found()
        mirrored: Keyring | None = None
        trusted = self.keyring
        try:
            trusted = keyring = self._read()
            mirrored = self._believed(found, trusted, or_fail=self.keyring is None)
            if mirrored is not None:
                check_succession(mirrored, keyring)
        except (KeyStoreUnavailableError, InvalidKeyringError, KeyringRegressionError) as error:
            if isinstance(error, KeyringRegressionError):
                self._events.regressed(error)
            kept = self._last(now) if trusted is None else None
            if mirrored is None:
                mirrored = self._believed(found, trusted or kept)
            if mirrored is not None:
                vault_is_silent = isinstance(error, KeyStoreUnavailableError)
                if vault_is_silent or not self._brings_keys(mirrored):
                    self._live_on(mirrored, kept, now, mono)
            elif found is not None:
                self._holder.doubt()
            raise
        if keyring.generation > 0:
            self._adopt(keyring, now, mono)
            if mirrored is not None:
                self._save(keyring)
        self._destroy_unplaced(keyring)
        return keyring

    def _last(self, now: datetime) -> Keyring | None:
        """Return what was in force here before the last start, if that may vouch for a mirror."""
        kept = self._kept.load()
        return kept if kept is not None and may_vouch(kept, now) else None

    def _believed(self, found: MirrorCopy | None, trusted: Keyring | None, *, or_fail: bool = False) -> Keyring | None:
        """Return what may be believed of the mirror; None where it cannot be told, or claims to be later unvouched for.

        `or_fail`: raise `MirrorNotBelievedError` for the latter. For a replica that has just started: the document in
        Vault is all that it knows, and the mirror may be right that Vault was restored.
        """
        if found is None:
            return None
        try:
            return self._shared.believed(found, trusted)
        except MirrorNotBelievedError as error:
            if trusted is None:
                return None
            self._events.mirror_refused(error)
            if or_fail:
                raise
            return None

    def _save(self, keyring: Keyring) -> bool:
        """Bring the mirror up to `keyring`, signed with its ACTIVE key or else its STANDBY; say whether it is."""
        signers = (self._signers.get(key.kid) for key in (keyring.active, keyring.standby) if key is not None)
        return self._shared.save(keyring, [signer for signer in signers if signer is not None])

    def _read(self) -> Keyring:
        """Return the keyring in Vault, if it may follow the one in force."""
        document = self._document.load()
        if document is None:
            keyring, self._version = Keyring(issuer=self._issuer), 0
        else:
            keyring = keyring_of_content(document.content, issuer=self._issuer, store=self._store_name)
            self._version = document.version
        if self._holder.view is not None:
            check_succession(self._holder.view.keyring, keyring)
        return keyring

    def _brings_keys(self, mirrored: Keyring) -> bool:
        """Say whether verifiers would hear of a key from the mirror that the view in force does not know.

        While Vault answers, the store alone brings none: whoever can write to it would be an issuer. What it takes away
        is believed.
        """
        view = self._holder.view
        return view is not None and any(view.keyring.get(key.kid) is None for key in mirrored.published)

    def _live_on(self, mirrored: Keyring, kept: Keyring | None, now: datetime, mono: float) -> None:
        """Make do with the mirror: adopt a later keyring, public part only, and take the store's word for the signer.

        Signed with are only keys that are in memory already. `kept` was in force before the start of a replica that
        has read nothing yet.
        """
        view = self._holder.view
        if view is None or view.keyring.generation < mirrored.generation:
            if mirrored.generation == 0:
                return
            before = kept if view is None else view.keyring
            try:
                if before is not None:
                    check_succession(before, mirrored)
            except KeyringRegressionError as error:
                self._events.regressed(error)
                return
            self._put_in_force(mirrored, now, mono)
        elif view.keyring.generation > mirrored.generation:
            if not self._save(view.keyring):
                return
        elif view.keyring != mirrored:
            return
        in_force = self._holder.view
        assert in_force is not None  # noqa: S101 - one was there, or was just put
        if self._shared.may_be_superseded(in_force.keyring) is False:
            self._holder.confirm(now, mono)
        elif self._shared.trouble is None or in_force is not view:
            self._holder.doubt()

    def _adopt(self, keyring: Keyring, now: datetime, mono: float) -> None:
        """Put `keyring` in force, with the signers of the key that signs and of the one that will.

        It is in force also where a signer cannot be had now: what is published, and what is revoked, does not wait.
        """
        view, active = self._holder.view, keyring.active
        wanted = [record for record in (active, keyring.standby) if record is not None]
        if view is not None and view.keyring == keyring and all(record.kid in self._signers for record in wanted):
            self._holder.confirm(now, mono)
            return
        signers: dict[str, Signer] = {}
        lost = set()
        for record in wanted:
            try:
                signers[record.kid] = self._signers.get(record.kid) or self._store.signer(_stored(record))
            except KeyLostError as error:
                lost.add(record.kid)
                if record.kid not in self._lost:
                    self._events.key_lost(record.kid, error)
            except KeyStoreUnavailableError as error:
                self._trouble = error
        self._signers, self._lost = signers, frozenset(lost)
        self._put_in_force(keyring, now, mono)

    def _put_in_force(self, keyring: Keyring, now: datetime, mono: float) -> None:
        """Serve `keyring`, and sign with its ACTIVE key where that is in memory."""
        view, active = self._holder.view, keyring.active
        self._holder.adopt(
            KeyringView(
                keyring=keyring,
                key=active,
                signer=self._signers.get(active.kid) if active is not None else None,
                jwks=keyring.key_set().to_json() if keyring.published else "",
                confirmed_at=now,
                confirmed_mono=mono,
            )
        )
        if view is None or view.keyring != keyring:
            self._kept.keep(keyring)
        self._events.adopted(keyring)

    def _prove(self, record: KeyRecord) -> None:
        """Sign with the key of `record` as it is in Vault now, whatever is in memory. Raises `KeyLostError`."""
        self._signers[record.kid] = self._store.signer(_stored(record))

    # -- acting ----------------------------------------------------------------------------------------------------

    def _take(self, step: Step, keyring: Keyring, pending: Sequence[RotationRequest], clock: Clock) -> Keyring:
        """Carry out `step` and write its result. Raises `DocumentConflictError` where somebody else was first, and
        `StoreUnavailableError` where the step needs the shared store.
        """
        created: StoredKey | None = None
        try:
            if isinstance(step, CreateKey):
                created = self._store.create()
                changed = keyring.with_created(created.jwk, created.version, clock.now())
            else:
                changed = self._changed(step, keyring, pending, clock)
        except KeyLostError as error:
            kid = getattr(step, "kid", "")
            self._events.key_lost(kid, error)
            # A key that nobody can sign with must not be published or activated: give it up, and plan anew.
            step, changed = RevokeKey(kid), keyring.with_revoked(kid, clock.now(), self._timing)
        if created is not None:
            # Until the document names it, the key is nobody's: if the write fails, the next reading tells whether to
            # destroy it.
            self._unplaced.append(created)
        now, mono = clock.now(), clock.mono()
        content = keyring_to_content(changed, store=self._store_name)
        self._version = self._document.replace(content, expected_version=self._version)
        self._unplaced = [key for key in self._unplaced if changed.get(key.jwk.kid) is None]
        self._events.step_taken(step, changed)
        self._adopt(changed, now, mono)
        self._save(changed)
        return changed

    def _changed(self, step: Step, keyring: Keyring, pending: Sequence[RotationRequest], clock: Clock) -> Keyring:
        """Return what `keyring` becomes by `step`, having done what must come before the write."""
        match step:
            case PublishKey(kid):
                self._prove(keyring.require(kid))
                self._shared.raise_to(keyring, kid)
                return keyring.with_published(kid, clock.now())
            case ActivateKey(kid):
                self._prove(keyring.require(kid))
                # Breakglass first: CI's requests are answered by their time as well, and can be many.
                answers = [
                    request.request_id
                    for request in sorted(pending, key=lambda request: not request.breakglass)
                    if request.kind is not RequestKind.REVOKE
                    and judge(request, keyring, timing=self._timing).status is RequestStatus.ACCEPTED
                ]
                return keyring.with_activated(kid, clock.now(), self._timing, answers=answers[:_ANSWERS_KEPT])
            case RemoveKey(kid):
                return keyring.with_removed(kid, clock.now())
            case RevokeKey(kid):
                return keyring.with_revoked(kid, clock.now(), self._timing)
            case DestroyKey(kid):
                self._store.destroy(_stored(keyring.require(kid)), live=[_stored(key) for key in keyring.live])
                return keyring.with_destroyed(kid, clock.now())
            case CreateKey() | PermitKey():  # pragma: no cover - the one is made by _take, the other writes nothing
                raise AssertionError(step)

    def _destroy_unplaced(self, keyring: Keyring) -> None:
        """Destroy the keys that this replica made and that lost the race for the document."""
        live = [_stored(key) for key in keyring.live]
        for key in tuple(self._unplaced):
            if keyring.get(key.jwk.kid) is None:
                try:
                    self._store.destroy(key, live=live)
                except KeyStoreUnavailableError as error:
                    self._trouble = error
                    continue
            self._unplaced.remove(key)


def _stored(record: KeyRecord) -> StoredKey:
    return StoredKey(jwk=record.jwk, version=record.version)
