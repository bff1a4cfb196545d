"""Verifying tokens on the receiving side, with no call home.

::

    verifier = Verifier(audience="payments")        # the rest from the environment
    claims = verifier.verify(token, peer_certificate=leaf)

A verifier knows the keys that the issuer publishes and the tokens that it has revoked, and a broker keeps it up to date
in the background: pushed on a stream (`carnet.watching`), or by questions (`carnet.keysets` has the rules). A token
whose key is known is verified in memory: no lock, no network, whatever goes on elsewhere. Once what is known is older
than `max_staleness`, a verifier says that it cannot tell.

Nothing is started before the first use, so a verifier may be made before a fork; each child then starts its own. If
it was used before the fork, a child goes on with the keys that it inherits and fetches anew. gRPC promises to work in
such a child only with ``GRPC_ENABLE_FORK_SUPPORT=1``.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from datetime import datetime, timedelta
from types import TracebackType
from typing import Final, Self

from cryptography import x509

from carnet.claims import Claims
from carnet.keyset_polling import AsyncKeySetPoller, KeySetPoller
from carnet.keyset_source import AsyncKeySetSource, AsyncTrustServiceSource, KeySetSource, TrustServiceSource
from carnet.keysets import OnStale
from carnet.peer import peer_of
from carnet.persisted import StateKeeper
from carnet.trust_servers import AsyncTrustChannels, TrustChannels
from carnet.trust_state import VerifierStatus
from carnet.verification import AsyncChanges, Changes, Mode, Verification
from carnet.verify import parse_unverified
from carnet.watching import AsyncWatcher, Watcher

__all__ = ["AsyncVerifier", "Mode", "Verifier", "VerifierStatus"]

_READY_TIMEOUT: Final = timedelta(seconds=10)


class Verifier(Verification[KeySetSource]):
    """Verifies tokens for one audience, from any number of threads.

    `audience`, `issuer`, `trust` (the brokers' trust listeners, ``host:port``), `ca_file` and `broker_name` come from
    ``CARNET_AUDIENCE``, ``CARNET_ISSUER``, ``CARNET_TRUST``, ``CARNET_CA_FILE`` and ``CARNET_BROKER_NAME`` where they
    are not given, and `identity`, which the trust listeners ask for, from ``CARNET_CERT_FILE`` and ``CARNET_KEY_FILE``.

    - `binding`: ``"certificate"`` accepts only tokens that are bound to the certificate of the caller; ``"none"`` also
      those that are bound to none, for services that cannot see the caller's certificate.
    - `mode`: ``"stream"`` has keys and revocations pushed, by a broker whose policy names this workload in the
      `served_by` of the audience; ``"poll"`` asks for them; ``"keys"`` asks for keys and does not look at revocations.
      Where a broker will not push, a verifier asks.
    - `max_staleness` (5 min): how old keys and revocations may be; `on_stale`: ``"refuse"``, or ``"accept"`` to go on
      with what there is.
    - `leeway` (30 s): how far ahead the issuer's clock may be.
    - `cooldown` (30 s): how often unknown keys are asked for, over all of them.
    - `fetch_timeout` (2 s): how long one fetch may take, and so how long `verify` may wait for an unknown key.
    - `state_dir` (``CARNET_CACHE_DIR``, or none): a directory where what is known outlives the process, so that one
      which starts while every broker is down can verify, until `max_staleness` is over. It must be this user's alone.
    - `source`: another place to get the key set from, made once in each process; then only `audience` and `issuer` are
      needed, and `mode` is ``"keys"``.

    Raises `ConfigError` for what is missing or wrong. A context manager: at its end the verifier is closed.
    """

    _poller: KeySetPoller | None = None
    _watcher: Watcher | None = None

    def verify(
        self,
        token: str | bytes,
        *,
        peer_certificate: bytes | x509.Certificate | None = None,
        now: datetime | None = None,
        on_stale: OnStale | str | None = None,
    ) -> Claims:
        """Return what `token` says, or raise.

        `peer_certificate` is the leaf that the caller showed in TLS (DER, PEM or parsed). `now` is aware UTC, by
        default the wall clock; `on_stale` by default that of the verifier. Does not wait where the key is known; for an
        unknown key it waits at most `fetch_timeout` for a fetch that all threads share.

        Raises `InvalidTokenError` (the token is not good), `KeySetUnavailableError` (it cannot be told), or
        `InvalidIdentityError` (`peer_certificate` is no certificate).
        """
        poller = self._running()
        peer = None if peer_certificate is None else peer_of(peer_certificate)
        choice = None if on_stale is None else self._on_stale(on_stale)
        unverified = parse_unverified(token)  # Once: a flood of unknown keys costs this and little more.
        claims = self._verify_known(unverified, peer, now, choice)
        if claims is None:
            poller.obtain(unverified.kid)
            claims = self._verify_known(unverified, peer, now, choice)
        if claims is None:
            raise self._lost()
        return claims

    def start(self) -> None:
        """Start to learn in the background now, rather than at the first use."""
        self._running()

    def ready(self) -> bool:
        """Say whether there is enough to decide with. Starts to learn where nothing did yet."""
        if self._closed:
            return False
        self._running()
        return self._usable()

    def wait_ready(self, timeout: timedelta = _READY_TIMEOUT) -> None:
        """Return once there is enough to decide with. Raises `KeySetUnavailableError` after `timeout`."""
        self._running().wait_usable(timeout)

    def close(self) -> None:
        """Take leave of the broker and stop, for good: what is verified afterwards raises `KeySetUnavailableError`."""
        self._closed = True
        poller, watcher = self._poller, self._watcher
        if poller is not None and poller.belongs_here():
            if watcher is not None:
                watcher.stop()
                watcher.join()
            poller.stop()
            poller.join()
            if (save := self._changes.last()) is not None:
                save()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _changes_with(self, keeper: StateKeeper | None) -> Changes:
        return Changes(self._state, keeper)

    def _running(self) -> KeySetPoller:
        self._check_open()
        poller = self._poller
        if poller is not None and poller.belongs_here():
            return poller
        with _starting:
            if self._poller is None or not self._poller.belongs_here():
                _inherited.add(self._poller, self._watcher)
                self._poller, self._watcher = self._made()
                # The threads do not hold the verifier: one that is dropped without close() ends its threads too.
                weakref.finalize(self, (self._watcher or self._poller).stop)
            return self._poller

    def _made(self) -> tuple[KeySetPoller, Watcher | None]:
        timeout, servers = self._fetch_timeout, self._servers
        if servers is None:
            assert self._source is not None  # noqa: S101 - for the type checker: there is one or the other
            return KeySetPoller(self._state, self._source(), timeout=timeout, changed=self._changes), None
        channels = TrustChannels(servers)
        source = TrustServiceSource(servers, channels)
        poller = KeySetPoller(
            self._state,
            source,
            timeout=timeout,
            revocations=None if self._mode is Mode.KEYS else source,
            changed=self._changes,
            awaits_push=self._mode is Mode.STREAM,
        )
        if self._mode is not Mode.STREAM:
            return poller, None
        return poller, Watcher(poller, servers, channels, audience=self._expectations.audience, choices=self._choices)


class AsyncVerifier(Verification[AsyncKeySetSource]):
    """Verifies tokens for one audience, in one event loop. Has the settings of `Verifier`.

    An asynchronous context manager: at its end the verifier is closed.
    """

    _poller: AsyncKeySetPoller | None = None
    _watcher: AsyncWatcher | None = None

    async def verify(
        self,
        token: str | bytes,
        *,
        peer_certificate: bytes | x509.Certificate | None = None,
        now: datetime | None = None,
        on_stale: OnStale | str | None = None,
    ) -> Claims:
        """Do what `Verifier.verify` does; waiting for an unknown key holds up this task only."""
        poller = self._running()
        peer = None if peer_certificate is None else peer_of(peer_certificate)
        choice = None if on_stale is None else self._on_stale(on_stale)
        unverified = parse_unverified(token)  # Once: a flood of unknown keys costs this and little more.
        claims = self._verify_known(unverified, peer, now, choice)
        if claims is None:
            await poller.obtain(unverified.kid)
            claims = self._verify_known(unverified, peer, now, choice)
        if claims is None:
            raise self._lost()
        return claims

    def start(self) -> None:
        """Start to learn in the background now, in the running event loop."""
        self._running()

    def ready(self) -> bool:
        """Say whether there is enough to decide with. Starts to learn where nothing did yet."""
        if self._closed:
            return False
        self._running()
        return self._usable()

    async def wait_ready(self, timeout: timedelta = _READY_TIMEOUT) -> None:  # noqa: ASYNC109 - as in `Verifier`
        """Return once there is enough to decide with. Raises `KeySetUnavailableError` after `timeout`."""
        await self._running().wait_usable(timeout)

    async def close(self) -> None:
        """Take leave of the broker and stop, for good: what is verified afterwards raises `KeySetUnavailableError`."""
        self._closed = True
        poller, watcher = self._poller, self._watcher
        if poller is not None and poller.belongs_here():
            if watcher is not None:
                watcher.stop()
                await watcher.join()
            poller.stop()
            await poller.join()
            if (save := self._changes.last()) is not None:
                await asyncio.to_thread(save)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _changes_with(self, keeper: StateKeeper | None) -> Changes:
        return AsyncChanges(self._state, keeper)

    def _running(self) -> AsyncKeySetPoller:
        self._check_open()
        poller = self._poller
        if poller is not None and poller.belongs_here():
            return poller
        if poller is not None and poller.runs_elsewhere():
            msg = "an AsyncVerifier belongs to one event loop: make another one for this loop"
            raise RuntimeError(msg)
        _inherited.add(poller, self._watcher)
        self._poller, self._watcher = self._made()
        weakref.finalize(self, (self._watcher or self._poller).stop)
        return self._poller

    def _made(self) -> tuple[AsyncKeySetPoller, AsyncWatcher | None]:
        timeout, servers = self._fetch_timeout, self._servers
        if servers is None:
            assert self._source is not None  # noqa: S101 - as in `Verifier`
            return AsyncKeySetPoller(self._state, self._source(), timeout=timeout, changed=self._changes), None
        channels = AsyncTrustChannels(servers)
        source = AsyncTrustServiceSource(servers, channels)
        poller = AsyncKeySetPoller(
            self._state,
            source,
            timeout=timeout,
            revocations=None if self._mode is Mode.KEYS else source,
            changed=self._changes,
            awaits_push=self._mode is Mode.STREAM,
        )
        if self._mode is not Mode.STREAM:
            return poller, None
        return poller, AsyncWatcher(
            poller, servers, channels, audience=self._expectations.audience, choices=self._choices
        )


class _Inherited:
    """Pollers of the process before the fork. Kept: to let go of their channels calls into a gRPC without threads."""

    def __init__(self) -> None:
        self._kept: list[object] = []

    def add(self, poller: KeySetPoller | AsyncKeySetPoller | None, watcher: Watcher | AsyncWatcher | None) -> None:
        if poller is not None and poller.pid != os.getpid():
            self._kept.append((poller, watcher))


_inherited = _Inherited()
_starting = threading.Lock()


def _after_fork_in_child() -> None:
    global _starting  # noqa: PLW0603 - the lock may be held by a thread that this process does not have
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
