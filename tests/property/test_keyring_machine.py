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
    Gate,
    Keyring,
    KeyState,
    PermitKey,
    PublishKey,
    RemoveKey,
    RevokeKey,
    Step,
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
        self.permitted: str | None = None

    @rule(seconds=st.sampled_from([1, 2, 5, 30, 95, 400]))
    def time_passes(self, seconds: int) -> None:
        """Let time pass, and forget tokens that are over."""
        self.now += seconds * SECOND
        self.tokens = [(kid, end) for kid, end in self.tokens if end > self.now]

    @rule(
        rotate=st.booleans(),
        rotate_now=st.sampled_from([False, False, False, True]),
        victim=st.sampled_from([*[None] * 20, 0, 1, 2, 3]),
        store=st.sampled_from(["acknowledged", "acknowledged", "lagging", "down"]),
    )
    def step(self, rotate: bool, rotate_now: bool, victim: int | None, store: str) -> None:
        """Take the step that the plan names for some wish."""
        keys = self.keyring.keys
        revoke = (keys[victim % len(keys)].kid,) if victim is not None and keys else ()
        gate = None if store == "down" else self.gate()
        wish = Wish(rotate_since=self.now if rotate else None, rotate_now=rotate_now, revoke=revoke)
        step = plan(self.keyring, now=self.now, timing=TIMING, gate=gate, wish=wish)
        if gate is None:
            assert not isinstance(step, CreateKey | PublishKey | PermitKey)
        if isinstance(step, Wait):
            # Straight to the moment at which something may happen: the boundaries are where faults live.
            if step.until is not None and step.until - self.now < TIMING.rotate_every / 2:
                self.time_passes(max(1, int((step.until - self.now) / SECOND)))
        elif isinstance(step, PermitKey):
            self.check_every_poller_has(step.kid)
            if step.overdue or store == "acknowledged":
                self.permitted = step.kid
        else:
            before, self.keyring = self.keyring, self.carried_out(step, now=rotate_now)
            assert before.generation + 1 == self.keyring.generation
            check_succession(before, self.keyring)
            self.history.append((self.now, self.keyring))

    def gate(self) -> Gate:
        """Return what the store knows: of the standby, once it is published."""
        standby = self.keyring.standby
        if standby is None:
            return Gate()
        return Gate(
            raised_at=standby.published_at,
            served_since=standby.published_at + LATE,
            permitted=self.permitted == standby.kid,
        )

    def carried_out(self, step: Step, *, now: bool) -> Keyring:
        """Return what the keyring becomes by `step`, having checked that the rest of the world is ready for it."""
        before = self.keyring
        match step:
            case CreateKey():
                return before.with_created(next(self.supply), None, self.now)
            case PublishKey(kid):
                return before.with_published(kid, self.now)
            case ActivateKey(kid):
                if not now and before.active is not None:
                    assert kid == self.permitted
                    self.check_every_poller_has(kid)
                else:
                    self.emergency_until = self.now + LATE + POLL + TIMING.skew
                return before.with_activated(kid, self.now, TIMING)
            case RemoveKey(kid):
                assert all(kid != signed for signed, _ in self.tokens), "a key is removed under a living token"
                return before.with_removed(kid, self.now)
            case RevokeKey(kid):
                self.revoked.add(kid)
                self.emergency_until = self.now + LATE + POLL + TIMING.skew
                self.tokens = [(signed, end) for signed, end in self.tokens if signed != kid]
                return before.with_revoked(kid, self.now, TIMING)
        assert isinstance(step, DestroyKey)
        assert before.get(step.kid).state in {KeyState.REMOVED, KeyState.REVOKED}
        return before.with_destroyed(step.kid, self.now)

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
