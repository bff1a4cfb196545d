"""The keyring against a model of the world around it: tokens, pollers, replicas that lag or are cut off.

The machine takes only the steps that `plan` names, at times of its own choosing, and holds them against what the rest
of the world relies on.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from carnet_broker.core.keyring import (
    ActivateKey,
    CreateKey,
    DestroyKey,
    Keyring,
    KeyState,
    PublishKey,
    RemoveKey,
    RevokeKey,
    Wait,
    Wish,
    check_succession,
    plan,
)
from carnet_broker.core.keyring_document import keyring_of_content, keyring_to_content
from support.counts import count
from support.keyrings import ISSUER, SECOND, T0, TIMING, jwks

LATE = TIMING.replica_lag
POLL = TIMING.max_age + TIMING.poller_interval


class KeyringWorld(RuleBasedStateMachine):
    """One keyring, the tokens signed with its keys, and what pollers can have loaded."""

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()
        self.now: datetime = T0
        self.supply = jwks()
        self.keyring = Keyring(issuer=ISSUER)
        self.history: list[tuple[datetime, Keyring]] = [(T0, self.keyring)]
        self.tokens: list[tuple[str, datetime]] = []
        self.emergency_until = T0 + timedelta(0)
        self.revoked: set[str] = set()

    @rule(seconds=st.sampled_from([1, 2, 5, 30, 95, 400]))
    def time_passes(self, seconds: int) -> None:
        """Let time pass, and forget tokens that are over."""
        self.now += seconds * SECOND
        self.tokens = [(kid, end) for kid, end in self.tokens if end > self.now]

    @rule(
        rotate=st.booleans(),
        rotate_now=st.sampled_from([False, False, False, True]),
        victim=st.sampled_from([*[None] * 20, 0, 1, 2, 3]),
    )
    def step(self, rotate: bool, rotate_now: bool, victim: int | None) -> None:
        """Take the step that the plan names for some wish."""
        keys = self.keyring.keys
        revoke = (keys[victim % len(keys)].kid,) if victim is not None and keys else ()
        standby = self.keyring.standby
        served_since = standby.published_at + LATE if standby is not None and standby.published_at else None
        wish = Wish(rotate=rotate, rotate_now=rotate_now, revoke=revoke)
        step = plan(self.keyring, now=self.now, timing=TIMING, served_since=served_since, wish=wish)
        before = self.keyring
        match step:
            case CreateKey():
                self.keyring = before.with_created(next(self.supply), None, self.now)
            case PublishKey(kid):
                self.keyring = before.with_published(kid, self.now)
            case ActivateKey(kid):
                if not rotate_now and before.active is not None:
                    self.check_every_poller_has(kid)
                else:
                    self.emergency_until = self.now + LATE + POLL + TIMING.skew
                self.keyring = before.with_activated(kid, self.now, TIMING)
            case RemoveKey(kid):
                assert all(kid != signed for signed, _ in self.tokens), "a key is removed under a living token"
                self.keyring = before.with_removed(kid, self.now)
            case RevokeKey(kid):
                self.keyring = before.with_revoked(kid, self.now, TIMING)
                self.revoked.add(kid)
                self.emergency_until = self.now + LATE + POLL + TIMING.skew
                self.tokens = [(signed, end) for signed, end in self.tokens if signed != kid]
            case DestroyKey(kid):
                assert before.get(kid).state in {KeyState.REMOVED, KeyState.REVOKED}
                self.keyring = before.with_destroyed(kid, self.now)
            case Wait(until):
                # Straight to the moment at which something may happen: the boundaries are where faults live.
                if until is not None and until - self.now < TIMING.rotate_every / 2:
                    self.time_passes(max(1, int((until - self.now) / SECOND)))
                return
        assert before.generation + 1 == self.keyring.generation
        check_succession(before, self.keyring)
        self.history.append((self.now, self.keyring))

    @rule(seconds_ago=st.sampled_from([0, 5, 29, 30]))
    def a_replica_signs(self, seconds_ago: int) -> None:
        """Sign as a replica whose view is up to `island` old: cut off, it goes on with the key that it knows."""
        at = self.now - seconds_ago * SECOND
        view = next((keyring for since, keyring in reversed(self.history) if since <= at), None)
        if view is not None and view.active is not None and view.active.kid not in self.revoked:
            self.tokens.append((view.active.kid, self.now + TIMING.longest_life))

    def check_every_poller_has(self, kid: str) -> None:
        """Whoever polls by the rules, from the slowest replica, has loaded `kid` by now."""
        loaded_at = self.now - POLL - TIMING.skew
        served = [keyring for since, keyring in self.history if since + LATE <= loaded_at]
        assert served, "activated before anybody could have loaded it"
        assert kid in served[-1].key_set().keys

    @invariant()
    def at_most_one_key_signs(self) -> None:
        """Two ACTIVE keys would be two truths."""
        assert len(self.keyring.in_state(KeyState.ACTIVE)) <= 1
        assert len(self.keyring.in_state(KeyState.STANDBY)) <= 1

    @invariant()
    def every_living_token_has_its_key_published(self) -> None:
        """No good token is refused for want of a key, wherever it was signed."""
        published = {key.kid for key in self.keyring.published}
        assert all(kid in published for kid, end in self.tokens if end + TIMING.skew > self.now)

    @invariant()
    def what_is_revoked_stays_so(self) -> None:
        """No step brings a revoked key back."""
        states = {key.kid: key.state for key in self.keyring.keys}
        assert all(states[kid] is KeyState.REVOKED for kid in self.revoked)

    @invariant()
    def the_document_is_lossless(self) -> None:
        """What another replica reads is what this one wrote."""
        if self.keyring.generation:
            content = keyring_to_content(self.keyring, store="kv")
            assert self.keyring == keyring_of_content(content, issuer=ISSUER, store="kv")


TestKeyringWorld = KeyringWorld.TestCase
TestKeyringWorld.settings = settings(max_examples=count("keyring_machine"), stateful_step_count=60, deadline=None)
