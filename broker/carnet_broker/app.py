"""The whole broker, wired by hand. The only module that knows every part.

One process, one event loop: it answers token calls, trust calls and the plain port. Vault is spoken to in threads of
its own, and so is the disk, because both can hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from carnet.admission import Admission
from carnet.errors import CarnetError
from carnet.log_lines import LineLimit
from carnet.v1 import admin_pb2_grpc, token_pb2_grpc, trust_pb2_grpc
from carnet_broker.config import BrokerConfig, host_and_port
from carnet_broker.core.minting import MintingRules
from carnet_broker.core.readiness import Readiness, judge_readiness
from carnet_broker.core.workload import IdentityCache, LeafRules, Workload
from carnet_broker.disk_thread import DiskThread
from carnet_broker.edges.grpc.admin import AdminServicer
from carnet_broker.edges.grpc.calls import AuthContext, AuthenticatedCalls, CallLimits
from carnet_broker.edges.grpc.listeners import ListenerLimits, MutualTls, bind, new_server
from carnet_broker.edges.grpc.refused_calls import refusal_record
from carnet_broker.edges.grpc.tokens import TokenServicer
from carnet_broker.edges.grpc.trust import TrustServicer
from carnet_broker.edges.grpc.watch import Watchers
from carnet_broker.edges.http.plain import plain_app
from carnet_broker.edges.http.serving import listen, new_plain_server
from carnet_broker.edges.ledger.json_lines import JsonLinesAudit
from carnet_broker.edges.vault import (
    KvKeyStore,
    TransitKeyStore,
    VaultKeyringDocument,
    VaultRotationRequests,
    VaultSession,
)
from carnet_broker.file_modes import check_audit_directory, mode_warnings
from carnet_broker.first_keyring import first_round, keyring_file
from carnet_broker.group_commit import GroupCommit
from carnet_broker.issuance import CHECK_EVERY, Issuer
from carnet_broker.keyring_loop import KeyringLoop
from carnet_broker.loading import load_policy_file, load_tls, load_vault_settings
from carnet_broker.parts import connections_possible, termination, until_stopped
from carnet_broker.ports import KeyStore, KeyStoreUnavailableError, Signer
from carnet_broker.revoking import Revoker
from carnet_broker.rotation import RotationDriver
from carnet_broker.shared_state import CLOCK_IS_OFF, CLOCK_IS_USELESS, SharedState, TellingHolder
from carnet_broker.telemetry import Telemetry
from carnet_broker.watched import Watched

__all__ = ["Broker", "SystemClock"]

_PLAIN_CONNECTIONS: Final = 512
_ADMIN_CONNECTIONS: Final = 16
_ADMIN_IDLE: Final = timedelta(minutes=1)
_OTHER_DESCRIPTORS: Final = 128 + _PLAIN_CONNECTIONS + 2 * _ADMIN_CONNECTIONS
"""Files, Vault, what gRPC needs for itself, and the smaller listeners."""
_LOOK_AT_FILES_EVERY: Final = 1.0
_AUDIT_DEADLINE: Final = timedelta(seconds=5)
_LAST_WRITE_WITHIN: Final = 1.0
"""Seconds that a write has at the end, though the time to drain is over."""


class SystemClock:
    """The clocks of this machine. Nothing below the edge reads them."""

    def now(self) -> datetime:
        """Return the wall time."""
        return datetime.now(UTC)

    def mono(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()


class Broker:
    """One broker process."""

    def __init__(
        self, config: BrokerConfig, *, clock: SystemClock | None = None, lines: LineLimit | None = None
    ) -> None:
        """Load every file and wire every part. Raises `ConfigError`; nothing is bound or sent yet.

        `lines`: the limit that the log of this process has; None is the default limit.
        """
        self._config = config
        self._clock = clock or SystemClock()
        self.telemetry = Telemetry(lines)
        self._draining = False
        limits = config.limits
        files = config.tls
        self._policy = Watched("policy", [config.policy_file], lambda: load_policy_file(config), self.telemetry)
        trust_domain = self._policy.value.trust_domain
        self._tls = Watched(
            "tls",
            [files.certificate_file, files.key_file, files.client_ca_file, *files.crl_files],
            lambda: load_tls(config, [trust_domain], self._clock.now()),
            self.telemetry,
        )
        timing = config.timing()
        self._watchers: Watchers | None = None
        self._holder = TellingHolder(self._changed, island=timing.island, confirm_within=config.keys.confirm_within)
        self._shared = SharedState(
            config,
            self._clock,
            self.telemetry,
            generation=self._generation,
            changed=self._changed,
            newer_keyring=lambda: self._keyring_loop.wake(),  # noqa: PLW0108 - it comes later
            sessions_written=lambda changes: self._keyring_loop.hear(changes),  # noqa: PLW0108 - it comes later
        )
        self.telemetry.trust.show_age(lambda: self._age().total_seconds())
        self._identities = IdentityCache(LeafRules(max_life=files.max_leaf_life))
        self._session = VaultSession(load_vault_settings(config))
        store: KeyStore = KvKeyStore(self._session) if config.keys.store == "kv" else TransitKeyStore(self._session)
        self._requests = VaultRotationRequests(self._session)
        self._keyring_loop = KeyringLoop(
            RotationDriver(
                document=VaultKeyringDocument(self._session),
                store=store,
                requests=self._requests,
                holder=self._holder,
                events=self.telemetry,
                issuer=config.issuer,
                store_name=config.keys.store,
                timing=timing,
                rollout=self._shared.store.rollout,
                mirror=self._shared.store.mirror,
                replicas=self._shared.loop.replicas_seen,
                kept=keyring_file(config, failed=self.telemetry.keyring_not_kept),
            ),
            self._clock,
            self.telemetry,
            poll_interval=config.vault.poll_interval,
        )
        check_audit_directory(config.audit.directory)
        self._audit = JsonLinesAudit(config.audit.directory, durability=config.audit.durability)
        self._audit_thread = DiskThread("carnet-audit")
        self._commit = GroupCommit(self._audit.issue, self._audit_thread, deadline=_AUDIT_DEADLINE)
        self._vault_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="carnet-sign")
        remote = config.keys.store == "transit"
        self._issuer = Issuer(
            rules=MintingRules(
                issuer=config.issuer,
                default_life=config.tokens.default_life,
                longest_life=config.tokens.longest_life,
                shortest_life=config.tokens.shortest_life,
            ),
            policy=lambda: self._policy.value,
            keys=self._holder,
            admission=Admission(rate=limits.tokens_per_second, burst=limits.token_burst),
            audit=self._audit,
            commit=self._commit,
            sign=self._sign_in_vault if remote else _sign_here,
            check_every=1 if remote else CHECK_EVERY,
            revocations=self._shared.revocations,
            obstacle=self._shared.obstacle,
            count_issued=self.telemetry.tokens.inc,
        )
        self._revoker = Revoker(
            issuer=config.issuer,
            keys=self._holder,
            rules=self._shared.rules,
            admission=Admission(rate=limits.revocations_per_second, burst=limits.revocation_burst),
            audit=self._audit,
            append=self._shared.loop.revoke,
            record=self._commit,
            unrecorded=self.telemetry.trust.revocation_unrecorded,
        )
        self._key_set_admission = Admission(rate=limits.key_sets_per_second, burst=2 * limits.key_sets_per_second)
        self._stop = asyncio.Event()
        self._look_now = asyncio.Event()
        self.addresses: dict[str, str] = {}
        """Where it listens, by listener, once `serve` has bound it."""

    async def serve(self, *, ready: asyncio.Event | None = None) -> bool:
        """Serve until SIGTERM or SIGINT, then drain. Raises `ConfigError` where it cannot start.

        Returns True when it was told to stop, False when a part of it ended by itself: then the rest is drained as
        well, because half a broker looks alive and is not.
        """
        loop = asyncio.get_running_loop()
        config = self._config
        await self._shared.open()
        await first_round(
            self._keyring_loop,
            config,
            self._clock,
            self.telemetry,
            is_loaded=lambda: self._holder.view is not None,
        )
        limits = ListenerLimits(
            max_connections=connections_possible(
                config.limits.connections, others=_OTHER_DESCRIPTORS, log=self.telemetry.log
            ),
            handshake_timeout=config.limits.handshake_timeout,
            connection_age=config.limits.connection_age,
        )
        few = replace(limits, max_connections=_ADMIN_CONNECTIONS, connection_idle=_ADMIN_IDLE)
        # Streams last, and must not take the place of calls.
        many = replace(limits, max_concurrent_calls=limits.max_connections)
        tokens, trust, admin = new_server(limits), new_server(many), new_server(few)
        on_tokens, on_trust, on_admin = (
            AuthenticatedCalls(
                self._authenticate,
                self.telemetry,
                limits=CallLimits(
                    read_within=config.limits.read_within,
                    write_within=config.trust.heartbeat,
                    calls_in_flight=config.limits.calls_in_flight,
                    streams=config.limits.streams,
                ),
                record=self._record_refusal,
            ).on(server)
            for server in (tokens, trust, admin)
        )
        health_servicer = health.aio.HealthServicer()
        token_servicer = TokenServicer(self._issuer, self._revoker, self._clock)
        token_pb2_grpc.add_TokenServiceServicer_to_server(token_servicer, on_tokens)
        self._watchers = watchers = self._shared.new_watchers(
            self._holder, policy=lambda: self._policy.value, read_keyring=self._keyring_loop.read_again
        )
        trust_servicer = TrustServicer(
            holder=self._holder,
            admission=self._key_set_admission,
            clock=self._clock,
            max_age=config.keys.max_age,
            watchers=watchers,
        )
        trust_pb2_grpc.add_TrustServiceServicer_to_server(trust_servicer, on_trust)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self._new_admin_servicer(), on_admin)
        for registration in (on_tokens, on_trust):
            health_pb2_grpc.add_HealthServicer_to_server(health_servicer, registration)
        servers = {
            "tokens": (tokens, config.listen.tokens),
            "trust": (trust, config.listen.trust),
            "admin": (admin, config.listen.admin),
        }
        tls = {name: MutualTls(lambda: self._tls.value.pems, few if name == "admin" else limits) for name in servers}
        self._bind(servers, tls)
        plain_socket = listen(*host_and_port(config.listen.plain), setting="listen.plain")
        self.addresses["plain"] = f"{config.listen.plain.rpartition(':')[0]}:{plain_socket.getsockname()[1]}"
        plain = new_plain_server(
            plain_app(
                readiness=self.readiness,
                holder=self._holder,
                max_age=config.keys.max_age,
                registry=self.telemetry.registry,
            ),
            connections=_PLAIN_CONNECTIONS,
        )
        self._keyring_loop.start()
        self._shared.loop.start()
        await asyncio.gather(*(server.start() for server, _ in servers.values()))
        plain_task = loop.create_task(plain.serve(sockets=[plain_socket]))
        watch_task = loop.create_task(self._watch_files(health_servicer), name="carnet-files")
        parts = {
            **{name: loop.create_task(termination(server)) for name, (server, _) in servers.items()},
            "plain": plain_task,
            "files": watch_task,
        }
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._look_now.set)
        for warning in mode_warnings(config):
            self.telemetry.log.warning("open_to_others", problem=warning)
        self.telemetry.log.info("serving", **self.addresses, issuer=config.issuer)
        if ready is not None:
            ready.set()
        told_to_stop = await until_stopped(self._stop, parts, self.telemetry.log)
        self.telemetry.log.info("draining")
        self._draining = True
        await self._report_health(health_servicer)
        for one in tls.values():
            one.freeze()
        drain = config.limits.drain.total_seconds()
        drained_at = self._clock.mono() + drain
        watchers.drain()
        await asyncio.gather(*(server.stop(drain) for server, _ in servers.values()))
        plain.should_exit = True
        watch_task.cancel()
        await asyncio.gather(plain_task, watch_task, return_exceptions=True)
        await self._close(drained_at)
        self.telemetry.log.info("stopped")
        return told_to_stop

    def _new_admin_servicer(self) -> AdminServicer:
        administration = self._shared.new_administration(
            policy=lambda: self._policy.value,
            revoker=self._revoker,
            keys=self._holder,
            keyring_loop=self._keyring_loop,
            audit=self._audit,
            record=self._commit,
        )
        return AdminServicer(administration)

    def _bind(self, servers: Mapping[str, tuple[grpc.aio.Server, str]], tls: Mapping[str, MutualTls]) -> None:
        """Bind each server to its address. Raises `ConfigError`."""
        for name, (server, address) in servers.items():
            port = bind(server, address, tls[name], setting=f"listen.{name}")
            self.addresses[name] = f"{address.rpartition(':')[0]}:{port}"

    async def _close(self, drained_at: float) -> None:
        """End the threads, and write out what is left of the audit record by `drained_at`, or a little later."""
        await asyncio.to_thread(self._keyring_loop.stop)
        await asyncio.to_thread(self._shared.close)
        left = max(drained_at - self._clock.mono(), _LAST_WRITE_WITHIN)
        if not await asyncio.to_thread(self._audit_thread.close, within=left):
            # No token of theirs has left. Whether they are on the disk, the disk knows: they count as issued.
            self.telemetry.log.error("audit_disk_hangs", records_in_doubt=self._commit.unwritten)
        self._vault_threads.shutdown(cancel_futures=True)
        self._audit.close()

    def stop(self) -> None:
        """Begin to drain, as SIGTERM does. To be called on the loop that serves."""
        self._stop.set()

    def readiness(self) -> Readiness:
        """Say whether this broker can issue, and what is amiss."""
        now, mono = self._clock.now(), self._clock.mono()
        identity = self._tls.value.identity
        offset = self._shared.loop.clock_offset
        try:
            self._holder.signing_key(now, mono)
            signable, why = True, ""
        except CarnetError as error:
            signable, why = False, str(error)
        return judge_readiness(
            needed=[
                (signable, f"signing key: {why}"),
                (now < identity.not_after, f"own certificate: ended at {identity.not_after.isoformat()}"),
                (self._audit.writable, "audit: the file cannot be written"),
                (
                    self._shared.age(now, mono) <= self._config.trust.max_staleness,
                    "store: the revocations were not read within trust.max_staleness",
                ),
                (offset <= CLOCK_IS_USELESS, f"clock: {offset.total_seconds():.1f} s from the store's"),
            ],
            wanted=[
                (not self._keyring_loop.failing, "vault: the last look at it failed; the log says why"),
                (not self._holder.is_degraded(now, mono), "vault: the keyring was not read lately"),
                (
                    not self._requests.overfull,
                    f"vault: {', '.join(sorted(self._requests.overfull))}: too many to be listed, some are deleted",
                ),
                (not self._shared.loop.failing, "store: the last look at it failed; the log says why"),
                (not self._keyring_loop.without_store, "store: the keyring cannot be rotated without it"),
                (offset <= CLOCK_IS_OFF, f"clock: {offset.total_seconds():.1f} s from the store's"),
                (self._policy.is_current, "policy: the newest file cannot be used"),
                (self._tls.is_current, "tls: the newest files cannot be used"),
            ],
            draining=self._draining,
        )

    # -- parts of serving ------------------------------------------------------------------------------------------

    def _authenticate(self, auth_context: AuthContext) -> Workload:
        """Return the workload behind a connection; judged anew at each call."""
        # On the server's side the chain is what was sent above the leaf, without it.
        sent = (*auth_context.get("x509_pem_cert", ()), *auth_context.get("x509_pem_cert_chain", ()))
        versions = auth_context.get("ssl_tls_version", ())
        workload = self._identities.authenticate(
            sent,
            tls_version=versions[0].decode("ascii", "replace") if versions else None,
            bundle=self._tls.value.bundle,
            now=self._clock.now(),
        )
        return self._shared.check_leaf(workload)

    def _record_refusal(self, error: CarnetError, workload: Workload | None, peer: str) -> None:
        """Put a call that reached no service on the audit record."""
        self._audit.refusal(refusal_record(error, workload, peer, self._clock.now()))

    async def _sign_in_vault(self, signer: Signer, inputs: Sequence[bytes]) -> list[bytes]:
        """Sign with a key that is not in this process: a round trip each, so several at a time, and off the loop.

        While Vault hangs, the threads are all waiting for it, and a call would wait for a thread. So the bound is here,
        not only in the session: shorter than what the SDK allows one broker, so that its caller hears why.
        """
        loop = asyncio.get_running_loop()
        within = self._config.vault.sign_within.total_seconds()
        try:
            async with asyncio.timeout(within):
                signing = [loop.run_in_executor(self._vault_threads, signer.sign, one) for one in inputs]
                return list(await asyncio.gather(*signing))
        except TimeoutError as error:
            msg = f"Vault did not sign within {within} s"
            raise KeyStoreUnavailableError(msg) from error

    async def _watch_files(self, health_servicer: health.aio.HealthServicer) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look_now.wait(), _LOOK_AT_FILES_EVERY)
            force = self._look_now.is_set()
            self._look_now.clear()
            # Never on the loop: a large policy takes seconds to load.
            await asyncio.to_thread(self._refresh, force=force)
            self.telemetry.tell_left_out()
            await self._report_health(health_servicer)

    def _refresh(self, *, force: bool = False) -> None:
        before = self._policy.value, self._tls.value
        self._policy.refresh(force=force)
        self._tls.refresh(force=force)
        if before != (self._policy.value, self._tls.value):
            self._changed()

    def _changed(self) -> None:
        """Tell the streams that keys, revocations or files have changed. From any thread."""
        if self._watchers is not None:
            self._watchers.changed()

    def _generation(self) -> int:
        """Return the generation of the keyring in force, 0 where there is none."""
        view = self._holder.view
        return 0 if view is None else view.keyring.generation

    def _age(self) -> timedelta:
        """Return how long ago keyring and store were read, whichever is longer ago."""
        now, mono = self._clock.now(), self._clock.mono()
        view = self._holder.view
        return timedelta.max if view is None else max(view.age(now, mono), self._shared.age(now, mono))

    async def _report_health(self, servicer: health.aio.HealthServicer) -> None:
        answer = health_pb2.HealthCheckResponse
        serving = answer.SERVING if self.readiness().ready else answer.NOT_SERVING
        for service in ("", "carnet.v1.TokenService", "carnet.v1.TrustService"):
            await servicer.set(service, serving)


async def _sign_here(signer: Signer, inputs: Sequence[bytes]) -> list[bytes]:
    """Sign with a key in memory: about 40 us, less than a thread would cost."""
    return [signer.sign(one) for one in inputs]
