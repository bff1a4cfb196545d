"""A broker of the world of `support.trust_world`: driver, loop of the store, and streams of the real one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from carnet.claims import Claims
from carnet.revocations import Revocation, RevocationKind
from carnet.spiffe import SpiffeID
from carnet_broker.core.keyring import Keyring, KeyringRegressionError
from carnet_broker.core.revocation import new_revocation
from carnet_broker.edges.grpc.trust import TrustServicer
from carnet_broker.edges.grpc.trust_knowledge import TrustKnowledge
from carnet_broker.edges.grpc.watch import Watchers, WatchRules
from carnet_broker.ports import KeyStoreUnavailableError, LogPosition, StoreUnavailableError
from carnet_broker.revocation_view import RevocationHolder
from carnet_broker.rotation import RotationDriver
from carnet_broker.signing import KeyringHolder, NoSigningKeyError
from carnet_broker.store_loop import StoreLoop, StorePorts, StoreTiming
from carnet_broker.store_parts import Claim
from support.keyrings import ISSUER, SECOND
from support.rotation import MemoryKept
from support.trust_parts import (
    HEARTBEAT,
    LEASE,
    LIFE,
    MAX_STALENESS,
    POLICY,
    RULES,
    TIMING,
    Clock,
    Link,
    Token,
)

if TYPE_CHECKING:
    from support.trust_verifier import Stream
    from support.trust_world import TrustWorld


NO_LIMIT: Final[Any] = SimpleNamespace(admit=lambda *_, **__: None)


class Broker:
    """One broker process."""

    def __init__(self, world: TrustWorld, replica_id: str, skew: timedelta) -> None:
        self.world = world
        self.replica_id = replica_id
        self.clock = Clock(world, skew)
        self.vault_up = self.store_up = True
        self.generations: list[int] = []
        self.positions: list[LogPosition] = []
        self.restored = 0
        self.streams: list[Stream] = []
        self.keys = KeyringHolder(island=TIMING.island, confirm_within=TIMING.island / 2)
        self.revocations = RevocationHolder()
        vault = [
            Link(port, lambda: self.vault_up, KeyStoreUnavailableError)
            for port in (world.document, world.key_store, world.requests)
        ]
        store = world.data.open(settled=30 * SECOND)
        linked: Any = {
            name: Link(getattr(store, name), lambda: self.store_up, StoreUnavailableError)
            for name in ("revocations", "sessions", "rollout", "replicas", "mirror", "wakeups")
        }
        self.loop = StoreLoop(
            StorePorts(
                log=linked["revocations"],
                sessions=linked["sessions"],
                rollout=linked["rollout"],
                leases=linked["replicas"],
                mirror=linked["mirror"],
                wakeups=linked["wakeups"],
            ),
            self.revocations,
            self.clock,
            _StoreHeard(self),
            replica_id=replica_id,
            version="model",
            timing=StoreTiming(poll_interval=SECOND, lease=LEASE, append_within=5 * SECOND),
            generation=lambda: self.generation,
            changed=lambda: self.watchers.changed(),  # noqa: PLW0108 - it is made later
            newer_keyring=self._read_keyring,
            sessions_written=lambda _: None,
        )
        self.driver: Any = RotationDriver(
            document=vault[0],
            store=vault[1],
            requests=vault[2],
            holder=self.keys,
            events=_RotationHeard(self),
            issuer=ISSUER,
            store_name="kv",
            timing=TIMING,
            rollout=linked["rollout"],
            mirror=linked["mirror"],
            replicas=self.loop.replicas_seen,
            kept=MemoryKept(),
        )
        self.watchers: Watchers = world.events.run_until_complete(self._watchers())
        self.trust = TrustServicer(
            holder=self.keys,
            admission=NO_LIMIT,
            clock=self.clock,
            max_age=TIMING.max_age,
            watchers=self.watchers,
        )

    @property
    def generation(self) -> int:
        """The generation that it serves, 0 for none."""
        return 0 if self.keys.view is None else self.keys.view.keyring.generation

    async def _watchers(self) -> Watchers:
        async def read_keyring() -> bool:
            return self.tick()

        async def read_store(claim: Claim | None) -> bool:
            if claim is not None:
                self.loop._claims.append(claim)
            return self.round()

        known = TrustKnowledge(
            keys=self.keys,
            revocations=self.revocations,
            policy=lambda: POLICY,  # type: ignore[arg-type,return-value]
            clock=self.clock,
            max_staleness=MAX_STALENESS,
            read_keyring=read_keyring,
            read_store=read_store,
        )
        rules = WatchRules(
            replica_id=self.replica_id, heartbeat=HEARTBEAT, max_age=TIMING.max_age, sessions_per_identity=200
        )
        events: Any = SimpleNamespace(streams=lambda _: None, pushed=lambda *_, **__: None, left=lambda _: None)
        return Watchers(known, rules, self.clock, NO_LIMIT, events, report=self.loop.report)

    def _read_keyring(self) -> None:
        self.tick()

    def tick(self) -> bool:
        """Do a round of the rotation driver; say whether Vault answered."""
        try:
            self.driver.tick(self.clock)
        except StoreUnavailableError:
            return True
        except (KeyStoreUnavailableError, KeyringRegressionError):
            return False
        return True

    def round(self) -> bool:
        """Do a round of the loop of the store; say whether it went well."""
        self.loop._attempt(self.loop._reading, self.loop.round)
        self.world.events.call_soon(lambda: None)
        return not self.loop._reading.failing

    def issue(self, subject: str, certificate: str) -> Token | None:
        """Issue a token, None where this broker may not."""
        now, mono = self.clock.now(), self.clock.mono()
        view, version = self.revocations.view, self.revocations.version
        if view is None or view.age(now, mono) > MAX_STALENESS:
            return None
        revoked = self.revocations.revocations
        if revoked.blocks(subject) or revoked.revokes_certificate([f"sha256:{certificate}"]):
            return None
        try:
            key, _ = self.keys.signing_key(now, mono)
        except NoSigningKeyError:
            return None
        self.world.tokens_made += 1
        return Token(
            key.kid,
            Claims(
                issuer=ISSUER,
                subject=SpiffeID.parse(subject),
                audience="payments",
                client_id=SpiffeID.parse(subject),
                expires_at=now + LIFE,
                issued_at=now,
                not_before=now,
                token_id=f"token-{self.world.tokens_made:012d}",
                scopes=("charge",),
                confirmation=certificate,
                revocation_version=version,
            ),
        )

    def revoke(self, kind: RevocationKind, value: str) -> tuple[Revocation, ...]:
        """Revoke, and return what was made durable; nothing where the store cannot be reached."""
        try:
            return self.loop._append([new_revocation(kind, value, now=self.clock.now(), rules=RULES)]).entries
        except StoreUnavailableError:
            return ()

    def die(self) -> None:
        """End at once, and say nothing to anybody but by closed connections."""
        for stream in self.streams:
            stream.task_over = True
            if stream.task is not None:
                stream.task.cancel()
        self.watchers._report_change = lambda *_, **__: None
        self.world.events.settle()


class _StoreHeard:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def store_answered(self) -> None:
        pass

    def store_failed(self, error: Exception) -> None:
        if not isinstance(error, StoreUnavailableError):
            raise error

    def store_restored(self, claim: Claim, found: LogPosition) -> None:
        self._broker.restored += 1

    def revocations_read(self, position: LogPosition, count: int) -> None:
        pass

    def verifiers_counted(self, live: int) -> None:
        pass

    def lease_renewed(self, *, live_replicas: int, clock_offset: float) -> None:
        pass


class _RotationHeard:
    """What the driver tells of; most of it is nobody's business here."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def adopted(self, keyring: Keyring) -> None:
        self._broker.generations.append(keyring.generation)
        self._broker.watchers.changed()

    def permitted(self, permit: Any, left_behind: Any) -> None:  # noqa: ANN401
        self._broker.world.permits.add((permit.generation, permit.kid))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None
