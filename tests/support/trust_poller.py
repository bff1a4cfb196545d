"""A verifier of the world of `support.trust_world` that asks by a timer, and opens no stream.

What it asks is `GetKeySet` and `GetRevocations` of the real service; when it asks, and what it makes of the answers, is
decided by the code of the SDK.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from carnet.errors import CarnetError, InvalidKeySetError, KeySetUnavailableError
from carnet.keyset_source import Polled, PolledParts, _key_set_reader, _revocations_reader
from carnet.keysets import KeySetSnapshot
from carnet.trust_messages import RefusedResponseError
from carnet.trust_wire import position_message
from carnet.v1.trust_pb2 import GetKeySetRequest, GetRevocationsRequest, GetRevocationsResponse
from carnet_broker.edges.grpc import calls
from support.keyrings import SECOND, T0
from support.trust_parts import SERVICE, TIMING
from support.trust_verifier import Verifier

if TYPE_CHECKING:
    from support.trust_broker import Broker

__all__ = ["FRESH", "Poller"]

FRESH: Final = TIMING.max_age + TIMING.poller_interval
"""How old the keys of a poller are at most that keeps to the max-age and reaches a broker that is not cut off."""
_CALLER: Final[Any] = SimpleNamespace(spiffe_id=SERVICE, not_after=T0 + timedelta(days=365))
_JITTER: Final = 0.5
_NOBODY: Final[Any] = None
"""The context of a call, at which nobody looks."""


class Poller(Verifier):
    """One verifier process that polls."""

    @property
    def is_fresh(self) -> bool:
        """Whether its knowledge is as new as that of a poller has to be. One that began with nothing has to have heard
        of revocations too: a broker that has just started without the store can tell it of keys alone.
        """
        age = self.state.keys.staleness(self.moment())
        return age is not None and age <= FRESH and self.state.position is not None

    def go_on(self, brokers: Sequence[Broker]) -> None:
        """Ask if that is due: one broker after the other, until one answers."""
        if self.state.keys.due_in(self.moment()) > 0 * SECOND:
            return
        self._ask(brokers)

    def connect(self, broker: Broker) -> None:
        """Ask one broker now, due or not."""
        self._ask([broker])

    def _ask(self, brokers: Sequence[Broker]) -> None:
        keys, state = self.state.keys, self.state
        keys.begin(self.moment())
        keyed = self._first_answer(brokers, self._key_set)
        told = self._first_answer(brokers, self._revocations)
        if not isinstance(keyed, KeySetSnapshot):
            keys.fail(self.moment(), jitter=_JITTER, why="nobody answers")
            return
        missing = "" if isinstance(told, Polled) else "nobody tells of revocations"
        if isinstance(told, Polled):
            try:
                state.apply(told.response, asked_at=told.asked_at, now=self.moment(), of_keys=False)
            except RefusedResponseError as error:
                missing = str(error)
        keys.succeed(keyed, self.moment(), jitter=_JITTER, incomplete=missing)

    def _first_answer(self, brokers: Sequence[Broker], ask: Any) -> object:  # noqa: ANN401 - one of the two below
        for broker in brokers:
            if (self.number, broker.replica_id) in self.world.cut:
                continue
            try:
                return self.world.events.run_until_complete(ask(broker))
            except (CarnetError, InvalidKeySetError, KeySetUnavailableError):
                continue
        return None

    async def _key_set(self, broker: Broker) -> KeySetSnapshot:
        calls._CALLER.set(_CALLER)
        asked_at = self.moment()
        answer = await broker.trust.GetKeySet(GetKeySetRequest(), _NOBODY)
        return _key_set_reader(self.state.keys.generation)(answer, asked_at)

    async def _revocations(self, broker: Broker) -> Polled:
        calls._CALLER.set(_CALLER)
        asked_at = self.moment()
        since = None if self.state.wants_all else self.state.position
        request = GetRevocationsRequest(**({} if since is None else {"from": position_message(since)}))
        answers: AsyncIterator[bytes] = broker.trust.GetRevocations(request, _NOBODY)
        parts = PolledParts()
        async for answer in answers:
            parts.add(GetRevocationsResponse.FromString(answer), self.moment())
        return _revocations_reader(since)(parts.whole(), asked_at)
