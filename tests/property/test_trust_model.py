"""Rotation, replicas, verifiers, revocation and partitions at once, in the world of `support.trust_world`.

What holds after each step:

1. No good token (no revocation names it, its key is not revoked, it is not over) is refused by a live verifier: one
   that was told that rotations wait for it, whose knowledge is not too old, and that no permit has left behind. Keys
   that breakglass made the signer are the exception, and subjects that were revoked before the store was restored. The
   same holds for one that polls, as long as its knowledge is not older than the poller window allows for.
2. No verifier accepts what is revoked once `max_staleness` has passed since the store has the revocation. A revocation
   of a subject means all tokens that are out, also where the store was restored before.
3. Never two ACTIVE keys, and never an ACTIVE key without a permit, but for the first one and those of breakglass.
4. Within an epoch no broker and no verifier loads a lower generation or version.
5. What a verifier has refused as revoked (other than by a block) it never accepts later.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from carnet.revocations import RevocationKind
from carnet_broker.ports import RequestKind
from support.counts import count
from support.keyrings import SECOND
from support.measurements import record
from support.trust_judge import Judge
from support.trust_parts import CERTIFICATES, SUBJECTS
from support.trust_verifier import Verifier
from support.trust_world import TrustWorld

NUMBER = st.integers(0, 5)


class TrustMachine(RuleBasedStateMachine):
    """Hypothesis takes the part of the scheduler, the network, and those who ask and revoke."""

    told: ClassVar[Counter[str]] = Counter()
    """What was done, over all stories."""

    @initialize(
        brokers=st.integers(2, 3),
        verifiers=st.integers(2, 4),
        pollers=st.integers(0, 2),
        skews=st.lists(st.integers(-2, 2), min_size=1, max_size=3),
        warm=st.sampled_from([True, True, True, False]),
    )
    def begin(self, brokers: int, verifiers: int, pollers: int, skews: list[int], warm: bool) -> None:
        """Begin with empty Vault and store, or with what has run for a while."""
        self.world = TrustWorld(brokers=brokers, verifiers=verifiers, pollers=pollers, skews=tuple(skews))
        self.judge = Judge(self.world)
        self.told["stories"] += 1
        self.backup = self.world.data.copy()
        if warm:
            self.world.run(40)

    def broker(self, number: int) -> Any:  # noqa: ANN401
        """Return one of the brokers."""
        return self.world.brokers[number % len(self.world.brokers)]

    def verifier(self, number: int) -> Verifier:
        """Return one of the verifiers."""
        return self.world.verifiers[number % len(self.world.verifiers)]

    @rule(seconds=st.sampled_from([4, 10, 30, 60]))
    def all_goes_on(self, seconds: int) -> None:
        """Everybody does what it does by itself, as far as the network lets it; tokens are issued and shown."""
        self.world.run(seconds, check=self.judge.look)
        self.all_issue()

    @rule()
    def rotation(self) -> None:
        """CI asks, and there is time enough for it, if nobody is cut off."""
        self.world.requests.submit(RequestKind.ROTATE, created_at=self.world.data.now())
        self.world.run(16, check=self.judge.look)
        self.all_issue()

    def all_issue(self) -> None:
        """Each broker issues a token, if it may."""
        for number in range(len(self.world.brokers)):
            self.world.issue(number, number % 2)

    @rule(seconds=st.sampled_from([1, 3, 12, 41]))
    def time_passes(self, seconds: int) -> None:
        """Nobody gets to do anything but look at the time."""
        self.world.pass_time(seconds * SECOND)

    @rule(number=NUMBER)
    def tick(self, number: int) -> None:
        """A broker does a round of rotation."""
        self.broker(number).tick()

    @rule(number=NUMBER)
    def store_round(self, number: int) -> None:
        """A broker does a round with the store; one that finds it behind begins an epoch."""
        broker = self.broker(number)
        view, now = broker.revocations.view, self.world.data._tables.position
        behind = view is not None and view.position.epoch == now.epoch and view.position.version > now.version
        broker.round()
        if behind and broker.store_up:
            assert self.world.data._tables.position.epoch > now.epoch

    @rule(number=NUMBER, broker=NUMBER)
    def connect(self, number: int, broker: int) -> None:
        """A verifier begins a stream; one that polls asks, due or not."""
        if not self.verifier(number).suspended:
            self.verifier(number).connect(self.broker(broker))

    @rule(number=NUMBER, up=st.booleans())
    def carry(self, number: int, up: bool) -> None:
        """One message arrives."""
        stream = self.verifier(number).stream
        if stream is not None:
            (stream.carry_up if up else stream.carry_down)()

    @rule(number=NUMBER)
    def goodbye(self, number: int) -> None:
        """A verifier takes leave."""
        self.verifier(number).goodbye()

    @rule(number=NUMBER)
    def suspend_or_resume(self, number: int) -> None:
        """A laptop is closed, or opened."""
        verifier = self.verifier(number)
        verifier.suspended = not verifier.suspended
        verifier.look_at_the_time()

    @rule(number=NUMBER)
    def broker_dies(self, number: int) -> None:
        """Another takes its place."""
        self.world.restart(number % len(self.world.brokers))

    @rule(number=NUMBER, kept=st.booleans())
    def verifier_restarts(self, number: int, kept: bool) -> None:
        """It begins with what it has kept, or with nothing."""
        verifier = self.verifier(number)
        if kept:
            verifier.keep()
        if verifier.stream is not None:
            verifier.stream.hang_up()
        verifier.begin(with_kept=kept)

    @rule(verifier=NUMBER, broker=NUMBER)
    def network(self, verifier: int, broker: int) -> None:
        """A link between a verifier and a broker is cut, or mended."""
        self.world.cut ^= {(self.verifier(verifier).number, self.broker(broker).replica_id)}

    @rule(number=NUMBER, vault=st.booleans())
    def partition(self, number: int, vault: bool) -> None:
        """A broker is cut off from Vault or the store, or finds it again."""
        broker = self.broker(number)
        if vault:
            broker.vault_up = not broker.vault_up
        else:
            broker.store_up = not broker.store_up

    @rule(kind=st.sampled_from([RequestKind.ROTATE, RequestKind.ROTATE, RequestKind.ROTATE_NOW, RequestKind.REVOKE]))
    def somebody_asks(self, kind: RequestKind) -> None:
        """CI asks for a rotation, or breakglass for what it may."""
        active = self.world.keyring().active
        kid = active.kid if active is not None and kind is RequestKind.REVOKE else None
        if kid is not None or kind is not RequestKind.REVOKE:
            at = self.world.data.now()
            self.world.requests.submit(kind, kid, breakglass=kind is not RequestKind.ROTATE, created_at=at)

    @rule(number=NUMBER, kind=st.sampled_from(list(RevocationKind)), which=st.integers(0, 1))
    def revoke(self, number: int, kind: RevocationKind, which: int) -> None:
        """Something is revoked."""
        if kind in {RevocationKind.TOKEN, RevocationKind.ROOT}:
            if not self.world.tokens:
                return
            value = self.world.tokens[-1].claims.token_id
        elif kind is RevocationKind.CERTIFICATE:
            value = f"sha256:{CERTIFICATES[which]}"
        else:
            value = SUBJECTS[which]
        self.judge.revoked(self.broker(number).revoke(kind, value))

    @rule(number=NUMBER, subject=st.integers(0, 1), certificate=st.integers(0, 1))
    def issue(self, number: int, subject: int, certificate: int) -> None:
        """A token is issued; from now on all verifiers are shown it after each step."""
        self.world.issue(number % len(self.world.brokers), subject, certificate)

    @rule()
    def back_up(self) -> None:
        """The store is copied."""
        self.backup = self.world.data.copy()

    @rule(luck=st.integers(0, 3))
    def restore(self, luck: int) -> None:
        """Now and then the copy takes the place of the store. That takes a while."""
        if luck == 0:
            self.told["restorations"] += 1
            self.world.pass_time(3 * SECOND)
            self.world.data.restore(self.backup)

    @rule(number=NUMBER)
    def clean(self, number: int) -> None:
        """A broker cleans the store."""
        if self.broker(number).store_up:
            self.broker(number).loop._store.leases.clean()

    @invariant()
    def holds(self) -> None:
        """All rules hold."""
        if hasattr(self, "judge"):
            self.told["steps"] += 1
            self.judge.look()

    def teardown(self) -> None:
        """Let go."""
        if hasattr(self, "world"):
            self.told["rotations"] += len(self.world.permits)
            self.told["revocations"] += len(self.judge.log)
            self.told["tokens"] += self.world.tokens_made
            self.world.close()


def test_the_rules_hold_whatever_happens():
    """As many stories as the count says, of up to forty steps each."""
    told: Counter[str] = Counter()
    TrustMachine.told = told
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        TrustMachine,
        settings=settings(
            max_examples=count("trust_model"),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    record("trust_model", dict(sorted(told.items())))
