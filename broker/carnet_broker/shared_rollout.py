"""What the rotation driver does with the shared store: the mirror of the keyring, and the gate before a key may sign.

The store may be down, and it may hang. When one call to it has failed, the round asks it nothing more: what needs it
waits for the next round, and what does not need it is held up by one timeout at most. The failure is kept as `trouble`.

The mirror is signed, and read with the mistrust of `core.mirror`: more can write to the store than may bring keys.

The mirror is never behind what `raise_to` builds on. So whoever has the generation of the mirror, and sees no permit
for a later key, knows which key signs, as far as the store can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TypeVar

from carnet_broker.core.keyring import Gate, Keyring, KeyState
from carnet_broker.core.keyring_document import InvalidKeyringError, keyring_of_content, keyring_to_content
from carnet_broker.core.mirror import MirrorCopy, MirrorNotBelievedError, MirrorSignature, mirror_signing_input
from carnet_broker.core.rollout import Permit, RolloutState, VerifierSession, served_since
from carnet_broker.ports import (
    KeyringMirror,
    KeyStoreUnavailableError,
    ReplicasSeen,
    Rollout,
    Signer,
    StoreUnavailableError,
    WaitingFor,
)

__all__ = ["SharedRollout"]

_T = TypeVar("_T")


class SharedRollout:
    """The store, as one driver uses it. Not thread-safe."""

    def __init__(
        self,
        *,
        rollout: Rollout,
        mirror: KeyringMirror,
        replicas: Callable[[], ReplicasSeen | None],
        issuer: str,
        store_name: str,
    ) -> None:
        """`replicas` returns what the store last said of the brokers, None where it did not yet."""
        self._rollout = rollout
        self._mirror = mirror
        self._replicas = replicas
        self._issuer = issuer
        self._store_name = store_name
        self._mirrored = 0
        """The generation of the mirror, as far as this round knows; 0 where the mirror is not one to believe."""
        self._raised = RolloutState(generation=0, kid="", raised_at=None, permit=None)
        self._first_served: dict[str, datetime] = {}
        self.trouble: StoreUnavailableError | None = None
        """The failure of this round, None while there was none."""

    def begin_round(self) -> None:
        """Forget the failure of the last round, and ask again."""
        self.trouble = None
        self._mirrored = 0

    # -- the mirror ------------------------------------------------------------------------------------------------

    def found(self) -> MirrorCopy | None:
        """Return what is in the mirror, generation 0 where there is nothing yet; None where that cannot be told."""
        try:
            found = self._ask(self._mirror.load)
            if found is None:
                return MirrorCopy(Keyring(issuer=self._issuer), 0, {}, None)
            keyring = keyring_of_content(found.content, issuer=self._issuer, store=self._store_name)
        except StoreUnavailableError:
            return None
        except InvalidKeyringError as error:
            self.trouble = StoreUnavailableError(f"the keyring in the shared store is not one of this broker: {error}")
            return None
        return MirrorCopy(keyring, found.generation, found.content, found.signature)

    def believed(self, found: MirrorCopy, anchor: Keyring | None) -> Keyring:
        """Return the keyring of `found` where `anchor`, which is trusted, vouches for it; generation 0 where it is
        empty, or not to be believed and no later than `anchor`. Raises `MirrorNotBelievedError` where it is later.
        """
        nothing = Keyring(issuer=self._issuer)
        if found.generation == found.keyring.generation == 0:
            return nothing
        try:
            found.check(anchor)
        except MirrorNotBelievedError as error:
            if not found.is_later_than(anchor):
                return nothing
            self.trouble = StoreUnavailableError(str(error))
            raise
        self._mirrored = found.keyring.generation
        return found.keyring

    def save(self, keyring: Keyring, signers: Sequence[Signer]) -> bool:
        """Bring the mirror up to `keyring`, signed with the first of `signers` that can; say whether it is.

        Without signers it is saved unsigned: nobody believes it, but whoever is without Vault learns that there is a
        later one. Where there are signers and none can sign now, it is not saved.
        """
        if self._mirrored < keyring.generation:
            content = keyring_to_content(keyring, store=self._store_name)
            signing_input = mirror_signing_input(content, issuer=keyring.issuer, generation=keyring.generation)
            try:
                signature = self._signed(signing_input, signers)
                self._ask(lambda: self._mirror.save(keyring.generation, content, signature))
            except StoreUnavailableError:
                return False
            self._mirrored = keyring.generation
        return True

    def _signed(self, signing_input: bytes, signers: Sequence[Signer]) -> MirrorSignature | None:
        """Return a signature of one of `signers`. Raises `StoreUnavailableError` where none can sign now."""
        if self.trouble is not None:
            raise self.trouble
        failure: KeyStoreUnavailableError | None = None
        for signer in signers:
            try:
                return MirrorSignature(signer.kid, signer.sign(signing_input))
            except KeyStoreUnavailableError as error:
                failure = error
        if failure is None:
            return None
        self.trouble = StoreUnavailableError(f"the keyring for the shared store could not be signed: {failure}")
        raise self.trouble from failure

    # -- the gate --------------------------------------------------------------------------------------------------

    def gate(self, keyring: Keyring, now: datetime) -> Gate | None:
        """Return how far the STANDBY of `keyring` is on its way, None where the store does not answer."""
        standby = keyring.standby
        try:
            raised = self._ask(self._rollout.state)
            if standby is not None and raised.kid != standby.kid and raised.generation < keyring.generation:
                # Published when there was no store, or the store is older than that. Nobody was counted for the key
                # yet, so it is as good now as before the publication.
                self._ask(lambda: self._rollout.raise_to(keyring.generation, standby.kid))
                raised = self._ask(self._rollout.state)
        except StoreUnavailableError:
            return None
        if raised.generation != self._raised.generation or raised.kid != self._raised.kid:
            self._first_served = {}
        self._raised = raised
        if standby is None or raised.kid != standby.kid:
            return Gate()
        return Gate(
            raised_at=raised.raised_at,
            served_since=self._served_since(raised.generation, now),
            permitted=raised.permit is not None,
        )

    def raise_to(self, keyring: Keyring, kid: str) -> None:
        """Prepare the publication of `kid` as the next generation after `keyring`. Raises `StoreUnavailableError`.

        The mirror has `keyring` by then: it was saved when it was read or written, and a save that fails is the last
        call of its round.
        """
        self._ask(lambda: self._rollout.raise_to(keyring.generation + 1, kid))

    def permit(self, kid: str, *, overdue: bool) -> tuple[Permit | None, tuple[VerifierSession, ...]]:
        """Ask for the permit for `kid`: return it, or None, and the verifiers that have not acknowledged the key.

        With `overdue` these are left behind. Both are empty where the store does not answer.
        """
        generation = self._raised.generation
        laggards: tuple[VerifierSession, ...] = ()
        replicas = self._replicas()
        seen = () if replicas is None else replicas.replicas
        try:
            answer = self._ask(lambda: self._rollout.permit(generation, kid, overdue=False, seen=seen))
            if isinstance(answer, WaitingFor):
                laggards = answer.laggards
                if overdue:
                    answer = self._ask(lambda: self._rollout.permit(generation, kid, overdue=True, seen=seen))
        except StoreUnavailableError:
            return None, ()
        return (answer if isinstance(answer, Permit) else None), laggards

    def may_be_superseded(self, keyring: Keyring) -> bool | None:
        """Say whether a key later than the ACTIVE one of `keyring`, which is the mirror's, may be ACTIVE; None where
        the store does not answer.
        """
        try:
            raised = self._ask(self._rollout.state)
        except StoreUnavailableError:
            return None
        if raised.generation > keyring.generation + 1:
            return True
        if raised.permit is None:
            return False
        key = keyring.get(raised.kid)
        if key is None:
            return raised.generation > keyring.generation
        return key.state in {KeyState.PENDING, KeyState.STANDBY}

    def _served_since(self, generation: int, now: datetime) -> datetime | None:
        """Return since when every live replica serves `generation`, None where one does not, or that is not known.

        A lease tells since when its replica serves the newest generation. What changes other keys must not begin the
        window anew, so the first time is kept.
        """
        seen = self._replicas()
        if seen is None or not seen.replicas or now > seen.now + max(lease.lease for lease in seen.replicas):
            return None  # What is older than a lease says nothing of who is live.
        leases = []
        for lease in seen.replicas:
            if lease.generation >= generation:
                first = self._first_served.setdefault(lease.replica_id, lease.generation_at)
                leases.append(replace(lease, generation_at=first))
            else:
                leases.append(lease)
        return served_since(leases, generation, seen.now)

    def _ask(self, call: Callable[[], _T]) -> _T:
        """Call the store, unless it has failed in this round. Raises `StoreUnavailableError`."""
        if self.trouble is not None:
            raise self.trouble
        try:
            return call()
        except StoreUnavailableError as error:
            self.trouble = error
            raise
