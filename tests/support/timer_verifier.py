"""A verifier as common JWT middleware is: it fetches ``/oauth2/jwks`` by a timer, and knows nothing of brokers.

It asks for no key that it misses, as middleware does not either while its own cooldown lasts. What it knows it verifies
as well as ours does (`carnet.verify`), so that what it refuses is due to the timer alone.
"""

from __future__ import annotations

import threading
import urllib.request
from datetime import datetime, timedelta
from types import TracebackType
from typing import Final, Self

from carnet.jwk import KeySet
from carnet.verify import Expectations, verify_token

__all__ = ["TimerVerifier"]

_FETCH_WITHIN: Final = 5.0


class TimerVerifier:
    """Fetches now, and then every `every`; `delay` puts the first timer off, so that many are not in step."""

    def __init__(
        self, address: str, *, issuer: str, audience: str, every: timedelta, delay: timedelta = timedelta()
    ) -> None:
        self._url = f"http://{address}/oauth2/jwks"
        self._every = every
        self._delay = delay
        self._expectations = Expectations(issuer=issuer, audience=audience)
        self._stop = threading.Event()
        self._keys = self._fetch()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(_FETCH_WITHIN)

    def verify(self, token: str, *, peer_thumbprint: str, now: datetime) -> None:
        """Raise `InvalidTokenError` unless the token is good by the keys of the last fetch."""
        verify_token(token, keys=self._keys, expectations=self._expectations, peer_thumbprint=peer_thumbprint, now=now)

    def _fetch(self) -> KeySet:
        with urllib.request.urlopen(self._url, timeout=_FETCH_WITHIN) as answer:  # noqa: S310 - http
            return KeySet.parse(answer.read())

    def _run(self) -> None:
        self._stop.wait(self._delay.total_seconds())
        while not self._stop.wait(self._every.total_seconds()):
            self._keys = self._fetch()
