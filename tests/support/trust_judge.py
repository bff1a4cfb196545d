"""Holds the world of `support.trust_world` to what must always be true (the rules are in `test_trust_model`)."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta

from carnet.revocations import Revocation, RevocationKind, RevocationSet
from carnet_broker.core.keyring import KeyState
from carnet_broker.ports import RequestKind
from support.keyrings import SECOND
from support.trust_parts import MAX_STALENESS, Token
from support.trust_poller import Poller
from support.trust_verifier import Verifier
from support.trust_world import TrustWorld

__all__ = ["Judge"]

_BY_RV = frozenset({RevocationKind.SUBJECT, RevocationKind.LIFT})


class Judge:
    """Holds a world to the rules above."""

    def __init__(self, world: TrustWorld) -> None:
        self.world = world
        self.log: list[Revocation] = []
        self.meant: dict[Revocation, set[str]] = {}
        self.since: dict[Revocation, timedelta | None] = {}
        self.documents = 0
        self.hurried: set[str] = set()
        self.places: dict[object, tuple[int, int, int]] = {}

    def revoked(self, entries: tuple[Revocation, ...]) -> None:
        """Note what was made durable. It is meant for all tokens that are out, whatever their `rv` says."""
        self.log.extend(entries)
        for entry in entries:
            if entry.kind in _BY_RV:
                out = [one.claims.token_id for one in self.world.tokens if str(one.claims.subject) == entry.value]
                self.meant.setdefault(entry, set()).update(out[-4:])

    def look(self) -> None:
        """Check everything."""
        self._documents()
        self._places()
        self._store()
        world = self.world
        tokens = [one for one in world.tokens if one.claims.expires_at > self._now()]
        values = {entry.value for entry in self.log}.union(*self.meant.values())
        world.tokens = [one for one in tokens[:-12] if one.claims.token_id in values] + tokens[-12:]
        for token, verifier in itertools.product(world.tokens, world.verifiers):
            if not verifier.suspended:
                self._token(token, verifier)

    def _now(self) -> datetime:
        return self.world.data.now() - 2 * SECOND

    def _token(self, token: Token, verifier: Verifier) -> None:
        token_id = token.claims.token_id
        named = [
            entry
            for entry in self.log
            if token_id in self.meant.get(entry, ()) or RevocationSet([entry]).refusal(token.claims) is not None
        ]
        before = verifier.refused.get(token.claims.token_id)
        verdict = verifier.judge(token)
        key = self.world.keyring().get(token.kid)
        revoked_key = key is not None and key.state is KeyState.REVOKED
        if before is not None and before.kind is not RevocationKind.BLOCK:
            assert verdict != "accepted", "what was refused as revoked is accepted again"
        if verdict == "accepted":
            for entry in named:
                since = self.since.get(entry)
                lifted = entry.kind is RevocationKind.BLOCK and any(
                    other.kind is RevocationKind.LIFT and other.value == entry.value for other in self.log
                )
                assert lifted or since is None or self.world.passed <= since + MAX_STALENESS, f"{entry} is not obeyed"
        elif not named and not revoked_key and self._is_live(verifier) and verdict != "over":
            ok = verdict == "unknown key" and token.kid in self.hurried
            ok = ok or (verdict == "revoked" and self._is_raised(verifier.refused[token_id]))
            assert ok, f"verifier {verifier.number} says {verdict!r} of a good token"

    def _is_raised(self, entry: Revocation) -> bool:
        """Say whether a new epoch has it for more tokens than it was meant for: one too many, not one too few."""
        origins = [one for one in self.log if one.kind in _BY_RV and one.value == entry.value]
        return entry.kind is RevocationKind.SUBJECT and entry not in origins and bool(origins)

    def _is_live(self, verifier: Verifier) -> bool:
        if isinstance(verifier, Poller):
            return verifier.is_fresh
        if not verifier.admitted or verifier.state.keys.usable(verifier.moment()) is None:
            return False
        name = f"verifier-{verifier.number}-{verifier.starts}"
        sessions = self.world.data._tables.sessions.values()
        return not any(session.instance_id == name and session.lagging for _, session in sessions)

    def _store(self) -> None:
        stored = self.world.stored()
        for entry in self.log:
            there = any(
                (other.kind, other.value) == (entry.kind, entry.value)
                and other.before_version >= entry.before_version
                and (
                    other.expires_at is None or (entry.expires_at is not None and other.expires_at >= entry.expires_at)
                )
                for other in stored
            )
            self.since[entry] = (self.since.get(entry) or self.world.passed) if there else None

    def _documents(self) -> None:
        written = self.world.document.written
        for number in range(max(self.documents, 1), len(written)):
            before, after = self.world.keyring(number - 1), self.world.keyring(number)
            assert len(after.in_state(KeyState.ACTIVE)) <= 1
            old, new = before.active, after.active
            if new is None or old is None or new.kid == old.kid:
                continue
            asked_now = {
                name for name, request in self.world.requests.requests.items() if request.kind is RequestKind.ROTATE_NOW
            }
            if after.require(old.kid).state is KeyState.REVOKED or asked_now & set(new.answers):
                self.hurried.add(new.kid)
            else:
                assert new.kid in {kid for _, kid in self.world.permits}, "a key became the signer without a permit"
        self.documents = len(written)

    def _places(self) -> None:
        places: dict[object, tuple[int, int, int]] = {}
        for broker in self.world.brokers:
            view = broker.revocations.view
            if view is not None:
                places[broker.replica_id] = (view.position.epoch, broker.generation, view.position.version)
            assert broker.generations == sorted(broker.generations)
        for verifier in self.world.verifiers:
            at = verifier.state.position
            if at is not None:
                places[verifier.number, verifier.starts] = (at.epoch, at.generation, at.revocation_version)
        for name, at_now in places.items():
            was = self.places.get(name, (0, 0, 0))
            assert at_now[0] >= was[0]
            assert at_now[0] > was[0] or (at_now[1] >= was[1] and at_now[2] >= was[2]), f"{name} went back"
        self.places = places
