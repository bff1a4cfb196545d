"""What both verifiers share: the settings, what is known of the issuer, and the check itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, Generic, TypeVar

from cryptography import x509

from carnet import settings
from carnet.claims import Claims
from carnet.errors import ConfigError, InvalidTokenError, InvalidTokenReason, KeySetUnavailableError
from carnet.identity import Identity, StrPath
from carnet.keyset_source import AsyncKeySetSource, KeySetSource
from carnet.keysets import KeySetRules, OnStale
from carnet.peer import PeerCertificate, peer_of
from carnet.persisted import StateFile, StateFileError, StateKeeper
from carnet.revocations import Position
from carnet.trust_servers import TrustServers, read_clocks
from carnet.trust_state import TrustState, VerifierStatus
from carnet.verify import Binding, Expectations, UnverifiedToken, verify_parsed
from carnet.watching import AsyncWatcher, Choices, Watcher

__all__ = ["AsyncChanges", "Changes", "Mode", "Verification"]

_log: Final = logging.getLogger("carnet.trust")

_LEEWAY: Final = timedelta(seconds=30)
_MAX_STALENESS: Final = timedelta(minutes=5)
_COOLDOWN: Final = timedelta(seconds=30)
_FETCH_TIMEOUT: Final = timedelta(seconds=2)
_SAVES: Final = 20
"""How often what is known is written down within `max_staleness` where nothing changes."""

_NO_NAMES: Final[frozenset[str]] = frozenset()

_Choice = TypeVar("_Choice", bound=StrEnum)
_Source = TypeVar("_Source", KeySetSource, AsyncKeySetSource)


class Mode(StrEnum):
    """How a verifier learns of keys and revocations."""

    STREAM = "stream"
    """A broker pushes them. Where none will, they are asked for."""
    POLL = "poll"
    """They are asked for now and then."""
    KEYS = "keys"
    """Keys are asked for, and revocations are not looked at: a revoked token is good until it ends."""


class Changes:
    """What is to be done after a change. Held by the poller, so it does not hold the verifier."""

    def __init__(self, state: TrustState, keeper: StateKeeper | None) -> None:
        self._state = state
        self._keeper = keeper
        self._listeners: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._told = 0

    def listen(self, listener: Callable[[], None]) -> None:
        """Have the bound method `listener` called after each change of the revocations."""
        self._listeners.append(weakref.WeakMethod(listener))

    def __call__(self) -> Callable[[], None]:
        """Look at what changed, under the lock; return what is to be done without it."""
        save = self._save()
        told, self._told = self._told, self._state.revision

        def afterwards() -> None:
            if save is not None:
                self._run(save)
            if told != self._state.revision:
                for listener in [listener() for listener in self._listeners]:
                    if listener is not None:
                        listener()

        return afterwards

    def last(self) -> Callable[[], None] | None:
        """Return what is to be done at the end, when nothing changes any more: write what is not written yet."""
        return self._save(last=True)

    def _run(self, save: Callable[[], None]) -> None:
        """Write where this is: in the thread that learns."""
        save()

    def _save(self, *, last: bool = False) -> Callable[[], None] | None:
        keeper, clocks = self._keeper, read_clocks()
        if keeper is None or not keeper.is_due(self._state.position, last=last):
            return None
        saved = self._state.saved(clocks)
        return None if saved is None else lambda: keeper.write(saved, wall=clocks.wall, last=last)


class AsyncChanges(Changes):
    """What `Changes` is, in an event loop: files are written in a thread."""

    def _run(self, save: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # The event loop is being closed.
            asyncio.get_running_loop().run_in_executor(None, save)


class Verification(ABC, Generic[_Source]):
    """The settings of a verifier, and what it decides from what is known."""

    _watcher: Watcher | AsyncWatcher | None = None

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
        mode: Mode | str | None = None,
        max_staleness: timedelta = _MAX_STALENESS,
        on_stale: OnStale | str = OnStale.REFUSE,
        leeway: timedelta = _LEEWAY,
        cooldown: timedelta = _COOLDOWN,
        fetch_timeout: timedelta = _FETCH_TIMEOUT,
        state_dir: StrPath | None = None,
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
        self._mode = _choose(Mode, "mode", mode or (Mode.STREAM if source is None else Mode.KEYS))
        if source is not None and self._mode is not Mode.KEYS:
            msg = f"a source of your own knows keys only, and mode is {str(self._mode)!r}: give 'keys', or leave it out"
            raise ConfigError(msg)
        self._state = TrustState(
            rules,
            issuer=self._expectations.issuer,
            now=read_clocks(),
            follows_revocations=self._mode is not Mode.KEYS,
        )
        self._choices = Choices(accepts_stale=rules.on_stale is OnStale.ACCEPT)
        self._fetch_timeout = fetch_timeout
        self._closed = False
        self._source: Callable[[], _Source] | None = source
        self._servers: TrustServers | None = None
        if source is None:
            identity = identity or settings.identity()
            self._servers = TrustServers(
                targets=settings.targets(settings.TRUST, trust),
                identity=identity,
                ca_pem=settings.ca_pem(ca_file),
                server_name=settings.broker_name(broker_name, workload=identity.spiffe_id),
                timeout=fetch_timeout,
            )
        self._changes = self._changes_with(self._restored(settings.cache_dir(state_dir), rules))

    def staleness(self) -> timedelta | None:
        """Return how old the knowledge at hand is, as its issuer and the time since tell; None where there is none.

        It is that of the key set or that of the revocations, whichever is older.
        """
        return self._state.keys.staleness(read_clocks())

    def position(self) -> Position | None:
        """Return how far this verifier has got, None as long as no broker told of revocations."""
        return self._state.position

    def status(self) -> VerifierStatus:
        """Return how this verifier is doing: one frozen value, for health pages and metrics. Starts nothing."""
        if self._watcher is not None:
            return self._watcher.status()
        return self._state.status(read_clocks(), target=None, live=False)

    @property
    def revision(self) -> int:
        """A number that grows with each change of the revocations: `is_revoked` may answer differently then."""
        return self._state.revision

    def is_revoked(self, claims: Claims, *, peer_certificate: x509.Certificate | None = None) -> bool:
        """Say whether a token that was verified has been revoked meanwhile, as far as is known here. Never waits."""
        try:
            self._check_revoked(claims, None if peer_certificate is None else peer_of(peer_certificate))
        except InvalidTokenError:
            return True
        return False

    def on_revocation(self, listener: Callable[[], None]) -> None:
        """Have the bound method `listener` called after each change of the revocations, as long as its object lives.

        It is called in the thread that learns of the change (of an `AsyncVerifier`: in its event loop), and must not
        wait.
        """
        self._changes.listen(listener)

    def will_accept_stale(self) -> None:
        """Say that some calls will be verified with ``on_stale="accept"``: then no rotation waits for this verifier.

        Done by itself at the first such call; said beforehand, the brokers know it from the start.
        """
        if not self._choices.accepts_stale:
            self._choices.accepts_stale = True
            if self._watcher is not None:
                self._watcher.renew()

    @abstractmethod
    def _changes_with(self, keeper: StateKeeper | None) -> Changes: ...

    def _restored(self, directory: str | None, rules: KeySetRules) -> StateKeeper | None:
        """Load what was kept, and return what goes on keeping it."""
        if directory is None or self._mode is Mode.KEYS:
            return None
        expected, clocks = self._expectations, read_clocks()
        file = StateFile(directory, issuer=expected.issuer, audience=expected.audience)
        try:
            saved = file.load(wall=clocks.wall, max_age=rules.max_staleness)
        except StateFileError as error:
            _log.warning("what was kept is not used: %s", error)
        else:
            if saved is not None:
                self._state.restore(saved, clocks)
                _log.info("begins with %s, as it was %s ago", file.path, saved.age)
        return StateKeeper(file, every=rules.max_staleness / _SAVES)

    def _on_stale(self, choice: OnStale | str | None) -> OnStale | None:
        if choice is None:
            return None
        on_stale = _choose(OnStale, "on_stale", choice)
        if on_stale is OnStale.ACCEPT:
            self.will_accept_stale()
        return on_stale

    def _verify_known(
        self,
        unverified: UnverifiedToken,
        peer: PeerCertificate | None,
        now: datetime | None,
        on_stale: OnStale | None,
    ) -> Claims | None:
        """Return the claims, None where the key is not at hand. Raises `InvalidTokenError`."""
        keys = self._state.keys.usable(read_clocks(), on_stale=on_stale)
        key = None if keys is None else keys.get(unverified.kid)
        if key is None:
            return None
        claims = verify_parsed(
            unverified,
            key=key,
            expectations=self._expectations,
            peer_thumbprint=None if peer is None else peer.thumbprint,
            now=datetime.now(UTC) if now is None else now,
        )
        self._check_revoked(claims, peer)
        return claims

    def _check_revoked(self, claims: Claims, peer: PeerCertificate | None) -> None:
        revocations = self._state.revocations
        names = peer.names if peer is not None and revocations.names_certificates else _NO_NAMES
        entry = revocations.refusal(claims, peer_names=names)
        if entry is not None:
            msg = f"the token is revoked, by revocation {entry.version} of kind {entry.kind}"
            raise InvalidTokenError(InvalidTokenReason.REVOKED, msg)

    def _usable(self) -> bool:
        return self._state.keys.usable(read_clocks()) is not None

    def _lost(self) -> KeySetUnavailableError:
        """Return the error for a key that was there a moment ago, and went with a newer generation."""
        return KeySetUnavailableError(self._state.keys.explain(read_clocks()))

    def _check_open(self) -> None:
        if self._closed:
            msg = "the verifier is closed"
            raise KeySetUnavailableError(msg)


def _choose(kind: type[_Choice], name: str, value: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        msg = f"{name} is {str(value)[:40]!r}: give {' or '.join(repr(str(choice)) for choice in kind)}"
        raise ConfigError(msg) from None
