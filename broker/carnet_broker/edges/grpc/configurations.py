"""When the TLS configuration of a listener is replaced: as often as gRPC survives it.

gRPC asks for the configuration at each handshake, under a lock, and uses it after it has let go of the lock
(github.com/grpc/grpc/issues/36693). A configuration that another handshake replaces in between is used after it was
freed: a hundred clients that connect at the same time, strangers among them, end the process. So a configuration is
replaced only when

- a keeper holds it, so that it is not freed: a handshake of the listener with itself that is not finished; or
- nobody has asked for one in the last half second, so that nobody can be in between.

Each replacement begins the keeper of the new configuration, and ends that of the old one half a second later. A new
configuration is also what keeps TLS sessions from being resumed: one of an earlier configuration finds no tickets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import grpc

from carnet_broker.edges.grpc.keeper import Keeper, KeeperState
from carnet_broker.edges.grpc.settled import SETTLED_AFTER

__all__ = ["Configurations", "Keeping", "TlsPems"]

_LOOK_AGAIN_AFTER: Final = 0.02
_REPLACED_AFTER: Final = 60.0
"""Seconds; the longest that a configuration is kept where no keeper comes to hold it."""
_LATE_AFTER: Final = 1.0
"""Seconds; how long a keeper that has no answer is waited for, and how often another one is tried."""


@dataclass(frozen=True, slots=True)
class TlsPems:
    """What a handshake is made with. PEM."""

    private_key: bytes
    certificate_chain: bytes
    client_ca: bytes

    def __repr__(self) -> str:
        return "TlsPems(...)"


class Keeping:
    """The keeper of the configuration that is there, and those of the ones before it. Times are seconds.

    The listener ends a keeper, like all handshakes, after `handshake_timeout`. One is relied upon only as long as it
    would still hold its configuration for twice the time that it has to.
    """

    def __init__(self, *, handshake_timeout: float, at_most: int) -> None:
        self._relied_upon_for = handshake_timeout - 2 * SETTLED_AFTER
        self._at_most = at_most
        self._keeper: Keeper | None = None
        self._began_at = float("-inf")
        self._before: deque[tuple[float, Keeper]] = deque()

    def is_held(self, mono: float) -> bool:
        """Say whether the configuration that is there stays in memory if it is replaced now."""
        return (
            len(self._before) < self._at_most
            and mono - self._began_at <= self._relied_upon_for
            and self._state() is KeeperState.HOLDING
        )

    def is_awaited(self, mono: float) -> bool:
        """Say whether the keeper can be expected to hold soon; the handshake that asks may be its own."""
        return mono - self._began_at < _LATE_AFTER and self._state() is KeeperState.WAITING

    def is_wanting(self, mono: float) -> bool:
        """Say whether to begin another keeper of the configuration that is there."""
        is_over = mono - self._began_at > self._relied_upon_for or self._state() is KeeperState.GONE
        return is_over and mono - self._began_at >= _LATE_AFTER

    def begin(self, keeper: Keeper | None, mono: float) -> None:
        """Take the keeper of the configuration that is there, or that there could be none."""
        if self._keeper is not None:
            self._keeper.close()
        self._keeper, self._began_at = keeper, mono

    def replace(self, mono: float) -> None:
        """Note that the configuration is replaced now. Its keeper goes on holding it for those who are using it."""
        if self._keeper is not None:
            self._before.append((mono, self._keeper))
            self._keeper = None

    def let_go(self, mono: float) -> None:
        """End the keepers of configurations that nobody can be using any more."""
        while self._before and mono - self._before[0][0] >= SETTLED_AFTER:
            self._before.popleft()[1].close()

    def _state(self) -> KeeperState:
        return KeeperState.GONE if self._keeper is None else self._keeper.state()


class Configurations:
    """What gRPC asks for at each handshake of one listener, never for two at once."""

    def __init__(
        self,
        pems: Callable[[], TlsPems],
        keeping: Keeping,
        *,
        mono: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._pems = pems
        self._keeping = keeping
        self._mono = mono
        self._sleep = sleep
        self._served = pems()
        self._asked_at = self._replaced_at = mono()
        self._open_keeper: Callable[[], Keeper | None] | None = None
        self._is_frozen = False

    @property
    def first(self) -> grpc.ServerCertificateConfiguration:
        """The configuration to begin with."""
        return _configuration(self._served)

    def keep_by(self, open_keeper: Callable[[], Keeper | None]) -> None:
        """Begin keepers with `open_keeper` from now on. Without this there are none."""
        self._open_keeper = open_keeper

    def freeze(self) -> None:
        """Replace nothing any more: a listener that stops ends its keepers too."""
        self._is_frozen = True

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Return a new configuration, or None to go on with the one that is there."""
        if self._is_frozen:
            return None
        current = self._pems()
        self._keeping.let_go(self._mono())
        is_due = current != self._served or self._mono() - self._replaced_at >= _REPLACED_AFTER
        # Whoever asked before us needs microseconds to be through. Waking up often gives its thread the processor also
        # where there is little of it; those who come after us wait for us.
        while is_due and not (self._keeping.is_held(self._mono()) or self._is_settled(self._mono())):
            self._sleep(_LOOK_AGAIN_AFTER)
        mono = self._mono()
        is_settled = self._is_settled(mono) and (is_due or not self._keeping.is_awaited(mono))
        is_safe = is_settled or self._keeping.is_held(mono)
        self._asked_at = mono
        if is_safe:
            self._served, self._replaced_at = current, mono
            self._keeping.replace(mono)
        # The keeper's own handshake asks after this call is over, so it begins with what this call returns, or with a
        # later one; and in that case it is not taken for the keeper of that.
        if self._open_keeper is not None and (is_safe or self._keeping.is_wanting(mono)):
            self._keeping.begin(self._open_keeper(), mono)
        return _configuration(current) if is_safe else None

    def _is_settled(self, mono: float) -> bool:
        """Say whether nobody can be between asking for a configuration and using it."""
        return mono - self._asked_at >= SETTLED_AFTER


def _configuration(pems: TlsPems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.private_key, pems.certificate_chain)], pems.client_ca)
