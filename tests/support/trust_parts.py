"""What the world of `support.trust_world` is made of: durations, clocks, links that can be cut, tokens."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, Final, Protocol

from cryptography.hazmat.primitives.asymmetric import ec

from carnet.claims import Claims
from carnet.errors import CarnetError
from carnet.jwk import PublicJWK
from carnet.spiffe import SpiffeID
from carnet_broker.core.revocation import RevocationRules
from carnet_broker.ports import StoredKey
from support.fakes import FakeKeyStore
from support.keyrings import SECOND, T0
from support.keyrings import TIMING as USUAL

TIMING: Final = replace(USUAL, min_interval=5 * SECOND, poller_interval=0 * SECOND)
"""A rotation may follow a publication within `MAX_STALENESS`: so the permits alone save those who watch."""
LEASE: Final = 15 * SECOND
MAX_STALENESS: Final = 40 * SECOND
HEARTBEAT: Final = 5 * SECOND
LIFE: Final = 60 * SECOND
"""Of a token."""
RULES: Final = RevocationRules(
    longest_life=LIFE,
    max_leaf_life=300 * SECOND,
    max_staleness=MAX_STALENESS,
    leeway=TIMING.leeway,
    skew=TIMING.skew,
)
SUBJECTS: Final = ("spiffe://prod.example/sa/orders", "spiffe://prod.example/sa/cron")
CERTIFICATES: Final = ("A" * 43, "B" * 42 + "A")
SERVICE: Final = SpiffeID.parse("spiffe://prod.example/sa/payments")
POLICY: Final = SimpleNamespace(
    audiences={"payments": SimpleNamespace(served_by=[SimpleNamespace(matches=lambda _: True)])}
)


class World(Protocol):
    """As much of the world as a clock looks at."""

    passed: timedelta
    """Since its beginning."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands until it is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 0.0

    def time(self) -> float:
        """Return the seconds that have passed in the world."""
        return self.at

    def settle(self) -> None:
        """Run until nothing is left that could run now."""
        while True:
            self.call_soon(self.stop)
            self.run_forever()
            timers = self._scheduled  # type: ignore[attr-defined]
            while timers and timers[0]._cancelled:
                heapq.heappop(timers)._scheduled = False
            if not self._ready and not (timers and timers[0]._when <= self.at):  # type: ignore[attr-defined]
                return


class Clock:
    """The clocks of one process: the wall is off by a skew, and the monotonic one stands still in a suspend."""

    def __init__(self, world: World, skew: timedelta = timedelta()) -> None:
        self._world = world
        self._skew = skew
        self.slept = timedelta()

    def now(self) -> datetime:
        """Return the wall time."""
        return T0 + self._world.passed + self._skew

    def mono(self) -> float:
        """Return monotonic seconds."""
        return (self._world.passed - self.slept).total_seconds()


class NumberedKeyStore(FakeKeyStore):
    """The same keys each time: what is found can be found again."""

    def create(self) -> StoredKey:
        """Make the next key."""
        key = ec.derive_private_key(2_000_003 + len(self.versions), ec.SECP256R1())
        jwk = PublicJWK.of(key.public_key())
        self.keys[jwk.kid], self.versions[jwk.kid] = key, None
        return StoredKey(jwk, None)


class Link:
    """A port at the other end of a link that can be cut."""

    def __init__(self, port: object, is_up: Callable[[], bool], error: type[CarnetError]) -> None:
        self._port = port
        self._is_up = is_up
        self._error = error

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a method of any port
        if not self._is_up():
            msg = "the link is cut"
            raise self._error(msg)
        return getattr(self._port, name)


@dataclass(frozen=True, slots=True)
class Token:
    """What a verifier is shown."""

    kid: str
    claims: Claims
