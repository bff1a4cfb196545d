"""What all brokers of an environment know together, as this one has it: the store, opened, and what was read of it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import lru_cache
from importlib.metadata import version as version_of
from typing import Final

from cryptography import x509

from carnet.admission import Admission
from carnet.certificate_names import certificate_names
from carnet.errors import ConfigError
from carnet_broker.acknowledgements import Acknowledgements, NotedLog
from carnet_broker.administration import Administration
from carnet_broker.config import BrokerConfig
from carnet_broker.core.ledger import KeyRevocationRecord
from carnet_broker.core.policy import Policy
from carnet_broker.core.revocation import RevocationRules
from carnet_broker.core.unauthenticated import IdentityReason, UnauthenticatedError
from carnet_broker.core.workload import Workload
from carnet_broker.edges.grpc.trust_knowledge import TrustKnowledge
from carnet_broker.edges.grpc.watch import Watchers, WatchRules
from carnet_broker.edges.store import open_store
from carnet_broker.issuance import Refusal, RefusalReason
from carnet_broker.keyring_loop import KeyringLoop
from carnet_broker.ports import AuditSink, Clock, SessionChange, StoreUnavailableError
from carnet_broker.revocation_view import RevocationHolder
from carnet_broker.revoking import Revoker
from carnet_broker.signing import KeyringHolder, KeyringView
from carnet_broker.store_loop import StoreLoop, StorePorts, StoreTiming
from carnet_broker.telemetry import Telemetry

__all__ = ["CLOCK_IS_OFF", "CLOCK_IS_USELESS", "SharedState", "TellingHolder"]

CLOCK_IS_OFF: Final = timedelta(seconds=5)
"""How far the clock of this host may be from the store's before this broker calls itself degraded."""
CLOCK_IS_USELESS: Final = timedelta(seconds=15)
"""From here on it issues nothing: its times would be wrong by more than verifiers allow."""
_TRY_AGAIN_AFTER: Final = 0.25
_ADMIN_CALLS_PER_SECOND: Final = 50
_ADMIN_BURST: Final = 500
"""Calls of one admin at once: a list of stolen tokens is long, and must not have to wait."""


class SharedState:
    """The shared store and this broker's part in it."""

    def __init__(
        self,
        config: BrokerConfig,
        clock: Clock,
        telemetry: Telemetry,
        *,
        generation: Callable[[], int],
        changed: Callable[[], None],
        newer_keyring: Callable[[], None],
        sessions_written: Callable[[Sequence[SessionChange]], None],
    ) -> None:
        """Wire the parts; nothing is sent yet. Raises `ConfigError`. See `StoreLoop` for the callables."""
        self._config = config
        self._clock = clock
        self._telemetry = telemetry
        self.replica_id = uuid.uuid4().hex
        """Names this process in the store."""
        self.store = open_store(
            config.store.url,
            password=config.store.password_file,
            timeout=config.store.timeout,
            sessions_per_identity=config.store.verifier_sessions,
            prepare=False,
        )
        self.revocations = RevocationHolder()
        self.rules = RevocationRules(
            longest_life=config.tokens.longest_life,
            max_leaf_life=config.tls.max_leaf_life,
            max_staleness=config.trust.max_staleness,
            leeway=config.keys.leeway,
            skew=config.keys.skew,
        )
        self._acknowledgements = Acknowledgements(clock)
        self._admin_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="carnet-admin")
        self.loop = StoreLoop(
            StorePorts(
                log=NotedLog(self.store.revocations, self._acknowledgements),
                sessions=self.store.sessions,
                rollout=self.store.rollout,
                leases=self.store.replicas,
                mirror=self.store.mirror,
                wakeups=self.store.wakeups,
            ),
            self.revocations,
            clock,
            telemetry.trust,
            replica_id=self.replica_id,
            version=version_of("carnet"),
            timing=StoreTiming(
                poll_interval=config.store.poll_interval,
                lease=config.store.lease,
                append_within=config.store.timeout + timedelta(seconds=1),
            ),
            generation=generation,
            changed=changed,
            newer_keyring=newer_keyring,
            sessions_written=sessions_written,
        )

    def new_watchers(
        self, keys: KeyringHolder, *, policy: Callable[[], Policy], read_keyring: Callable[[], Awaitable[bool]]
    ) -> Watchers:
        """Return the streams of this broker, none yet. To be called on the loop that serves them."""
        config, limits = self._config, self._config.limits
        known = TrustKnowledge(
            keys=keys,
            revocations=self.revocations,
            policy=policy,
            clock=self._clock,
            max_staleness=config.trust.max_staleness,
            read_keyring=read_keyring,
            read_store=self.loop.read_again,
        )
        rules = WatchRules(
            replica_id=self.replica_id,
            heartbeat=config.trust.heartbeat,
            max_age=config.keys.max_age,
            sessions_per_identity=config.store.verifier_sessions,
        )
        admission = Admission(rate=limits.key_sets_per_second, burst=limits.streams)
        report = self._acknowledgements.reporting(self.loop.report)
        return Watchers(known, rules, self._clock, admission, self._telemetry.trust, report=report)

    def new_administration(
        self,
        *,
        policy: Callable[[], Policy],
        revoker: Revoker,
        keys: KeyringHolder,
        keyring_loop: KeyringLoop,
        audit: AuditSink,
        record: Callable[[Sequence[KeyRevocationRecord]], Awaitable[None]],
    ) -> Administration:
        """Return what serves those who run the brokers. `record` makes records durable."""
        return Administration(
            policy=policy,
            revoker=revoker,
            rules=self.rules,
            revocations=self.revocations,
            keys=keys,
            keyring_loop=keyring_loop,
            timing=self._config.timing(),
            store=self.loop,
            sessions=self.store.sessions,
            rollout=self.store.rollout,
            acknowledgements=self._acknowledgements,
            store_threads=self._admin_threads,
            store_timeout=self._config.store.timeout + timedelta(seconds=1),
            admission=Admission(rate=_ADMIN_CALLS_PER_SECOND, burst=_ADMIN_BURST),
            audit=audit,
            record=record,
            unrecorded=self._telemetry.trust.revocation_unrecorded,
            clock=self._clock,
        )

    async def open(self) -> None:
        """Bring the tables up to date, and read the revocations. Raises `ConfigError` if the store cannot be used.

        A store that does not answer may be starting too, so it is asked again for a while.
        """
        deadline = self._clock.mono() + self._config.store.start_within.total_seconds()
        while True:
            try:
                await asyncio.to_thread(self.store.prepare)
                await asyncio.to_thread(self.loop.round)
            except StoreUnavailableError as error:
                if self._clock.mono() > deadline:
                    msg = f"store.url: {error} ({error.__cause__ or 'no answer'})"
                    raise ConfigError(msg) from error
                await asyncio.sleep(_TRY_AGAIN_AFTER)
            else:
                return

    def close(self) -> None:
        """End the lease, the threads and the connections."""
        self.loop.stop()
        self._admin_threads.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    def check_leaf(self, workload: Workload) -> Workload:
        """Return `workload`. Raises `UnauthenticatedError` where its certificate was revoked here."""
        entry = self.revocations.revocations.revokes_certificate(_names(workload.leaf))
        if entry is not None:
            raise UnauthenticatedError(IdentityReason.REVOKED, f"by revocation {entry.version}: {entry.value}")
        return workload

    def age(self, now: datetime, mono: float) -> timedelta:
        """Return how long ago the store was read."""
        view = self.revocations.view
        return timedelta.max if view is None else view.age(now, mono)

    def obstacle(self, now: datetime, mono: float) -> Refusal | None:
        """Say why nothing may be issued now, as far as the store knows; None where it may."""
        if self.age(now, mono) > self._config.trust.max_staleness:
            text = "the broker has not read the newest revocations for too long"
            return Refusal(RefusalReason.STORE_UNAVAILABLE, text, timedelta(seconds=1))
        if self.loop.clock_offset > CLOCK_IS_USELESS:
            text = "the clock of the broker is wrong"
            return Refusal(RefusalReason.CLOCK_IS_OFF, text, timedelta(seconds=5))
        return None


class TellingHolder(KeyringHolder):
    """Tells of each keyring that is put in force."""

    def __init__(self, changed: Callable[[], None], *, island: timedelta, confirm_within: timedelta) -> None:
        super().__init__(island=island, confirm_within=confirm_within)
        self._changed = changed

    def adopt(self, view: KeyringView) -> None:
        """Put `view` in force."""
        super().adopt(view)
        self._changed()


@lru_cache(maxsize=4096)
def _names(leaf: x509.Certificate) -> frozenset[str]:
    return certificate_names(leaf)
