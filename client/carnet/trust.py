"""Verifying tokens on the receiving side, with no call home.

::

    verifier = Verifier(audience="payments")        # the rest from the environment
    claims = verifier.verify(token, peer_certificate=leaf)

A verifier knows the keys that the issuer publishes and keeps them fresh in the background (`carnet.keysets` has the
rules). A token whose key is known is verified in memory: no lock, no network, whatever goes on elsewhere.

Nothing is started before the first use, so a verifier may be made before a fork; each child then starts its own. If
it was used before the fork, a child goes on with the keys that it inherits and fetches anew. gRPC promises to work in
such a child only with ``GRPC_ENABLE_FORK_SUPPORT=1``.
"""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

from cryptography import x509

from carnet import settings
from carnet.claims import Claims, certificate_thumbprint
from carnet.errors import ConfigError, KeySetUnavailableError
from carnet.identity import Identity, StrPath
from carnet.keyset_polling import AsyncKeySetPoller, KeySetPoller
from carnet.keyset_source import (
    AsyncKeySetSource,
    AsyncTrustServiceSource,
    KeySetSource,
    TrustServers,
    TrustServiceSource,
    read_clocks,
)
from carnet.keysets import KeySetCache, KeySetRules, OnStale
from carnet.verify import Binding, Expectations, UnverifiedToken, parse_unverified, verify_parsed

__all__ = ["AsyncVerifier", "Verifier"]

_LEEWAY: Final = timedelta(seconds=30)
_MAX_STALENESS: Final = timedelta(minutes=5)
_COOLDOWN: Final = timedelta(seconds=30)
_FETCH_TIMEOUT: Final = timedelta(seconds=2)
_READY_TIMEOUT: Final = timedelta(seconds=10)

_Choice = TypeVar("_Choice", bound=StrEnum)
_Source = TypeVar("_Source", KeySetSource, AsyncKeySetSource)


class _Verification(ABC, Generic[_Source]):
    """What both verifiers share: the settings, the key set at hand, and the check itself."""

    def __init__(
        self,
        *,
        audience: str | None = None,
        issuer: str | None = None,
        trust: str | Iterable[str] | None = None,
        identity: Identity | None = None,
        ca_file: StrPath | None = None,
        broker_name: str | None = None,
        binding: Binding | str = Binding.CERTIFICATE,
        max_staleness: timedelta = _MAX_STALENESS,
        on_stale: OnStale | str = OnStale.REFUSE,
        leeway: timedelta = _LEEWAY,
        cooldown: timedelta = _COOLDOWN,
        fetch_timeout: timedelta = _FETCH_TIMEOUT,
        source: Callable[[], _Source] | None = None,
    ) -> None:
        if fetch_timeout <= timedelta():
            msg = f"fetch_timeout must be longer than nothing, and is {fetch_timeout}"
            raise ConfigError(msg)
        self._expectations = Expectations(
            issuer=settings.issuer(issuer),
            audience=settings.audience(audience),
            binding=_choose(Binding, "binding", binding),
            leeway=leeway,
        )
        rules = KeySetRules(
            max_staleness=max_staleness, on_stale=_choose(OnStale, "on_stale", on_stale), cooldown=cooldown
        )
        self._cache = KeySetCache(rules, issuer=self._expectations.issuer)
        self._fetch_timeout = fetch_timeout
        self._closed = False
        if source is None:
            identity = identity or settings.identity()
            servers = TrustServers(
                targets=settings.targets(settings.TRUST, trust),
                identity=identity,
                ca_pem=settings.ca_pem(ca_file),
                server_name=settings.broker_name(broker_name, workload=identity.spiffe_id),
                timeout=fetch_timeout,
            )
            source = self._source_over(servers)
        self._source: Callable[[], _Source] = source

    def staleness(self) -> timedelta | None:
        """Return how old the key set at hand is, as its issuer and the time since tell; None where there is none."""
        snapshot = self._cache.snapshot
        return None if snapshot is None else snapshot.staleness(read_clocks())

    @abstractmethod
    def _source_over(self, servers: TrustServers) -> Callable[[], _Source]: ...

    def _verify_known(self, unverified: UnverifiedToken, thumbprint: str | None, now: datetime | None) -> Claims | None:
        """Return the claims, None where the key is not at hand. Raises `InvalidTokenError`."""
        keys = self._cache.usable(read_clocks())
        key = None if keys is None else keys.get(unverified.kid)
        if key is None:
            return None
        return verify_parsed(
            unverified,
            key=key,
            expectations=self._expectations,
            peer_thumbprint=thumbprint,
            now=datetime.now(UTC) if now is None else now,
        )

    def _usable(self) -> bool:
        return self._cache.usable(read_clocks()) is not None

    def _lost(self) -> KeySetUnavailableError:
        """Return the error for a key that was there a moment ago, and went with a newer generation."""
        return KeySetUnavailableError(self._cache.explain(read_clocks()))

    def _check_open(self) -> None:
        if self._closed:
            msg = "the verifier is closed"
            raise KeySetUnavailableError(msg)


class Verifier(_Verification[KeySetSource]):
    """Verifies tokens for one audience, from any number of threads.

    `audience`, `issuer`, `trust` (the brokers' trust listeners, ``host:port``), `ca_file` and `broker_name` come from
    ``CARNET_AUDIENCE``, ``CARNET_ISSUER``, ``CARNET_TRUST``, ``CARNET_CA_FILE`` and ``CARNET_BROKER_NAME`` where they
    are not given, and `identity`, which the trust listeners ask for, from ``CARNET_CERT_FILE`` and ``CARNET_KEY_FILE``.

    - `binding`: ``"certificate"`` accepts only tokens that are bound to the certificate of the caller; ``"none"`` also
      those that are bound to none, for services that cannot see the caller's certificate.
    - `max_staleness` (5 min): how old the key set may be; `on_stale`: ``"refuse"``, or ``"accept"`` to go on with it.
    - `leeway` (30 s): how far ahead the issuer's clock may be.
    - `cooldown` (30 s): how often unknown keys are asked for, over all of them.
    - `fetch_timeout` (2 s): how long one fetch may take, and so how long `verify` may wait for an unknown key.
    - `source`: another place to get the key set from, made once in each process; then only `audience` and `issuer` are
      needed.

    Raises `ConfigError` for what is missing or wrong. A context manager: at its end the verifier is closed.
    """

    _poller: KeySetPoller | None = None

    def verify(
        self,
        token: str | bytes,
        *,
        peer_certificate: bytes | x509.Certificate | None = None,
        now: datetime | None = None,
    ) -> Claims:
        """Return what `token` says, or raise.

        `peer_certificate` is the leaf that the caller showed in TLS (DER, PEM or parsed). `now` is aware UTC, by
        default the wall clock. Does not wait where the key is known; for an unknown key it waits at most
        `fetch_timeout` for a fetch that all threads share.

        Raises `InvalidTokenError` (the token is not good), `KeySetUnavailableError` (it cannot be told), or
        `InvalidIdentityError` (`peer_certificate` is no certificate).
        """
        poller = self._running()
        thumbprint = None if peer_certificate is None else certificate_thumbprint(peer_certificate)
        unverified = parse_unverified(token)  # Once: a flood of unknown keys costs this and little more.
        claims = self._verify_known(unverified, thumbprint, now)
        if claims is None:
            poller.obtain(unverified.kid)
            claims = self._verify_known(unverified, thumbprint, now)
        if claims is None:
            raise self._lost()
        return claims

    def start(self) -> None:
        """Start to fetch in the background now, rather than at the first use."""
        self._running()

    def ready(self) -> bool:
        """Say whether there is a key set that may decide. Starts to fetch where nothing did yet."""
        if self._closed:
            return False
        self._running()
        return self._usable()

    def wait_ready(self, timeout: timedelta = _READY_TIMEOUT) -> None:
        """Return once there is a key set that may decide. Raises `KeySetUnavailableError` after `timeout`."""
        self._running().wait_usable(timeout)

    def close(self) -> None:
        """Stop fetching, for good: whatever is verified afterwards raises `KeySetUnavailableError`."""
        self._closed = True
        poller = self._poller
        if poller is not None and poller.belongs_here():
            poller.stop()
            poller.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _source_over(self, servers: TrustServers) -> Callable[[], KeySetSource]:
        return lambda: TrustServiceSource(servers)

    def _running(self) -> KeySetPoller:
        self._check_open()
        poller = self._poller
        if poller is not None and poller.belongs_here():
            return poller
        with _starting:
            if self._poller is None or not self._poller.belongs_here():
                _inherited.add(self._poller)
                self._poller = KeySetPoller(self._cache, self._source(), timeout=self._fetch_timeout)
                # The thread does not hold the verifier: one that is dropped without close() ends its thread too.
                weakref.finalize(self, self._poller.stop)
            return self._poller


class AsyncVerifier(_Verification[AsyncKeySetSource]):
    """Verifies tokens for one audience, in one event loop. Has the settings of `Verifier`.

    An asynchronous context manager: at its end the verifier is closed.
    """

    _poller: AsyncKeySetPoller | None = None

    async def verify(
        self,
        token: str | bytes,
        *,
        peer_certificate: bytes | x509.Certificate | None = None,
        now: datetime | None = None,
    ) -> Claims:
        """Do what `Verifier.verify` does; waiting for an unknown key holds up this task only."""
        poller = self._running()
        thumbprint = None if peer_certificate is None else certificate_thumbprint(peer_certificate)
        unverified = parse_unverified(token)  # Once: a flood of unknown keys costs this and little more.
        claims = self._verify_known(unverified, thumbprint, now)
        if claims is None:
            await poller.obtain(unverified.kid)
            claims = self._verify_known(unverified, thumbprint, now)
        if claims is None:
            raise self._lost()
        return claims

    def start(self) -> None:
        """Start to fetch in the background now, in the running event loop."""
        self._running()

    def ready(self) -> bool:
        """Say whether there is a key set that may decide. Starts to fetch where nothing did yet."""
        if self._closed:
            return False
        self._running()
        return self._usable()

    async def wait_ready(self, timeout: timedelta = _READY_TIMEOUT) -> None:  # noqa: ASYNC109 - as in `Verifier`
        """Return once there is a key set that may decide. Raises `KeySetUnavailableError` after `timeout`."""
        await self._running().wait_usable(timeout)

    async def close(self) -> None:
        """Stop fetching, for good: whatever is verified afterwards raises `KeySetUnavailableError`."""
        self._closed = True
        poller = self._poller
        if poller is not None and poller.belongs_here():
            poller.stop()
            await poller.join()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _source_over(self, servers: TrustServers) -> Callable[[], AsyncKeySetSource]:
        return lambda: AsyncTrustServiceSource(servers)

    def _running(self) -> AsyncKeySetPoller:
        self._check_open()
        poller = self._poller
        if poller is not None and poller.belongs_here():
            return poller
        if poller is not None and poller.runs_elsewhere():
            msg = "an AsyncVerifier belongs to one event loop: make another one for this loop"
            raise RuntimeError(msg)
        _inherited.add(poller)
        self._poller = AsyncKeySetPoller(self._cache, self._source(), timeout=self._fetch_timeout)
        weakref.finalize(self, self._poller.stop)
        return self._poller


def _choose(kind: type[_Choice], name: str, value: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        msg = f"{name} is {str(value)[:40]!r}: give {' or '.join(repr(str(choice)) for choice in kind)}"
        raise ConfigError(msg) from None


class _Inherited:
    """Pollers of the process before the fork. Kept: to let go of their channels calls into a gRPC without threads."""

    def __init__(self) -> None:
        self._kept: list[KeySetPoller | AsyncKeySetPoller] = []

    def add(self, poller: KeySetPoller | AsyncKeySetPoller | None) -> None:
        if poller is not None and poller.pid != os.getpid():
            self._kept.append(poller)


_inherited = _Inherited()
_starting = threading.Lock()


def _after_fork_in_child() -> None:
    global _starting  # noqa: PLW0603 - the lock may be held by a thread that this process does not have
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
