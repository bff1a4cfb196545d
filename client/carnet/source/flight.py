"""One request in flight: which brokers it goes to, and what their answers make of it.

No I/O; the sync and the async client drive it. Per broker one try: `targets` in the order of `Failover`; a token or a
refusal ends the request, anything else goes on to the next broker, and after the last one it has failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

import grpc

from carnet.cache import Failure, Issued, TokenKey
from carnet.endpoints import Failover, Target
from carnet.identity import Identity
from carnet.source.wire import Miss, no_answer, refused

__all__ = ["Flight"]

_NEVER: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(eq=False, slots=True)
class Flight:
    """The state of one request. Not thread-safe."""

    key: TokenKey
    identity: Identity
    broker_name: str
    targets: list[Target]
    """The brokers that were not asked yet."""
    background: bool
    """Whether it replaces a token that is at hand, with no caller waiting."""
    asking: Target | None = None
    """The broker whose answer is awaited."""
    sent: float = 0.0
    """When the last broker was asked, in monotonic seconds."""
    sent_at: datetime = _NEVER
    """The same by the wall clock."""
    misses: list[Miss] = field(default_factory=list)

    def next_target(self, *, mono: float, now: datetime) -> Target:
        """Return the broker to ask now."""
        self.asking, self.sent, self.sent_at = self.targets.pop(0), mono, now
        return self.asking

    def answered(
        self, result: Issued | Miss, failover: Failover, *, mono: float, now: datetime
    ) -> Issued | Failure | None:
        """Take the answer of the broker that was asked. Return how the request ended, or None: ask the next one."""
        if isinstance(result, Issued):
            failover.succeeded(self._asked())
            return result
        if result.is_refusal:
            failover.succeeded(self._asked())
            return refused(result, self.key, self.identity, now=now)
        failover.failed(self._asked(), mono)
        self.misses.append(result)
        return None if self.targets else self._no_answer(self.misses, now)

    def late(self, waited: timedelta, now: datetime) -> Failure:
        """Return the failure of a caller that waited for `waited` and cannot wait longer; the request goes on."""
        waiting = [] if self.asking is None else [_still_silent(self.asking, waited)]
        return self._no_answer([*self.misses, *waiting], now)

    def _asked(self) -> Target:
        target, self.asking = self.asking, None
        if target is None:
            msg = "an answer came that nobody asked for"
            raise RuntimeError(msg)
        return target

    def _no_answer(self, misses: list[Miss], now: datetime) -> Failure:
        return no_answer(misses, self.key, self.identity, broker_name=self.broker_name, now=now)


def _still_silent(target: Target, waited: timedelta) -> Miss:
    text = f"no answer within {waited.total_seconds():g} s"
    return Miss(target, grpc.StatusCode.DEADLINE_EXCEEDED, text, None, None)
