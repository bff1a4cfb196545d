"""A verifier of the world of `support.trust_world`, and its connection to a broker."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from carnet.errors import CarnetError
from carnet.keysets import KeySetRules, Moment
from carnet.revocations import Revocation
from carnet.trust_messages import RefusedResponseError
from carnet.trust_state import SavedTrust, TrustState
from carnet.trust_wire import request_message, watch_response
from carnet.v1 import trust_pb2
from carnet.watch_protocol import WatchProtocol
from support.keyrings import ISSUER, T0
from support.trust_parts import (
    MAX_STALENESS,
    SERVICE,
    Clock,
    Token,
)

if TYPE_CHECKING:
    from support.trust_broker import Broker
    from support.trust_world import TrustWorld


class Stream:
    """One connection between a verifier and a broker: nothing is lost or reordered as long as it lasts."""

    def __init__(self, verifier: Verifier, broker: Broker) -> None:
        self.verifier = verifier
        self.broker = broker
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.task: asyncio.Task[None] | None = None
        self.task_over = False
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        broker.streams.append(self)

    # -- what the broker sees: a `LongCall` ------------------------------------------------------------------------

    def workload(self) -> Any:  # noqa: ANN401 - as much of a Workload as is looked at
        """Return who is at the other end."""
        return SimpleNamespace(spiffe_id=SERVICE, not_after=T0 + timedelta(days=365))

    async def first(self) -> bytes:
        """Return the first request."""
        request = await self._inbox.get()
        assert request is not None
        return request

    async def next(self) -> bytes | None:
        """Return the next request."""
        return await self._inbox.get()

    async def write(self, response: bytes) -> None:
        """Send."""
        self.down.append(response)

    # -- the network -----------------------------------------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        """Whether anything gets through now."""
        return (self.verifier.number, self.broker.replica_id) not in self.broker.world.cut

    def carry_up(self) -> bool:
        """Bring one request to the broker."""
        if not self.up or not self.is_up or self.task_over:
            return False
        self._inbox.put_nowait(self.up.popleft())
        if self.task is None:
            self.task = self.broker.world.events.create_task(self._serve())
        self.broker.world.events.settle()
        return True

    def carry_down(self) -> bool:
        """Bring one response to the verifier, or the end of the stream."""
        if self.verifier.stream is not self or not self.is_up or self.verifier.suspended:
            return False
        if self.down:
            self.verifier.take(self.down.popleft())
            return True
        if self.task_over:
            self.verifier.stream = None
            return True
        return False

    def hang_up(self) -> None:
        """Close it at the verifier's end; the broker notices where the network works."""
        self.verifier.stream = None
        self.up.clear()
        if self.is_up and self.task is not None and not self.task_over:
            self._inbox.put_nowait(None)
            self.broker.world.events.settle()

    async def _serve(self) -> None:
        try:
            await self.broker.watchers.serve(self)  # type: ignore[arg-type]
        except CarnetError:
            pass
        finally:
            self.task_over = True


class Verifier:
    """One verifier process, with what it learns by its stream."""

    def __init__(self, world: TrustWorld, number: int, skew: timedelta) -> None:
        self.world = world
        self.number = number
        self.skew = skew
        self.kept: SavedTrust | None = None
        self.kept_at = T0
        self.starts = 0
        self.begin()

    def begin(self, *, with_kept: bool = False) -> None:
        """Start the process."""
        self.starts += 1
        self.clock = Clock(self.world, self.skew)
        self.suspended = False
        self.admitted = False
        self.stream: Stream | None = None
        self.heard_at = 0.0
        self.refused: dict[str, Revocation] = {}
        rules = KeySetRules(max_staleness=MAX_STALENESS)
        self.state = TrustState(rules, issuer=ISSUER, now=self.moment(), follows_revocations=True)
        self.protocol: WatchProtocol | None = None
        if with_kept and self.kept is not None:
            age = self.kept.age + max(self.clock.now() - self.kept_at, timedelta())
            if age <= MAX_STALENESS:
                kept = self.kept
                saved = SavedTrust(kept.position, kept.keys, kept.max_age, kept.entries, age)
                self.state.restore(saved, self.moment())

    def moment(self) -> Moment:
        """Read both clocks."""
        return Moment(self.clock.mono(), self.clock.now())

    def keep(self) -> None:
        """Write down what is known."""
        saved = self.state.saved(self.moment())
        if saved is not None:
            self.kept, self.kept_at = saved, self.clock.now()

    def connect(self, broker: Broker) -> None:
        """Begin a stream."""
        if self.stream is not None:
            self.stream.hang_up()
        self.stream = Stream(self, broker)
        self.heard_at = self.clock.mono()
        name = f"verifier-{self.number}-{self.starts}"
        self.protocol = WatchProtocol(self.state, instance_id=name, audience="payments", accepts_stale=False)
        self.say(self.protocol.hello(self.moment()))

    def go_on(self, brokers: Sequence[Broker]) -> None:
        """Do what it does by itself: have a stream, with the first of `brokers` if it has none."""
        if self.stream is None:
            self.connect(brokers[0])

    def say(self, said: Any) -> None:  # noqa: ANN401 - any of the requests
        """Send."""
        assert self.stream is not None
        self.stream.up.append(request_message(said).SerializeToString())

    def take(self, message: bytes) -> None:
        """Take a response in, and answer it."""
        assert self.protocol is not None
        assert self.stream is not None
        response = watch_response(trust_pb2.WatchResponse.FromString(message))
        self.heard_at = self.clock.mono()
        try:
            self.protocol.receive(response, self.moment())
        except RefusedResponseError:
            self.stream.hang_up()
            return
        self.admitted = response.live and self.state.keys.usable(self.moment()) is not None
        self.say(self.protocol.answer(self.moment()))

    def goodbye(self) -> None:
        """End in good order."""
        if self.stream is not None and self.protocol is not None:
            self.say(self.protocol.goodbye())
        self.admitted = False

    def look_at_the_time(self) -> None:
        """Leave a broker that says nothing, and see whether the knowledge at hand is too old."""
        if self.suspended:
            return
        if self.state.keys.usable(self.moment()) is None:
            self.admitted = False
        if self.stream is not None and self.protocol is not None:
            quiet = timedelta(seconds=self.clock.mono() - self.heard_at)
            if quiet > self.protocol.patience:
                self.stream.hang_up()

    def judge(self, token: Token) -> str:
        """Return what becomes of a token that is shown to it: its own words, without the signature."""
        now = self.moment()
        keys = self.state.keys.usable(now)
        if keys is None:
            return "stale"
        if keys.get(token.kid) is None:
            return "unknown key"
        if token.claims.expires_at <= now.wall:
            return "over"
        entry = self.state.revocations.refusal(token.claims)
        if entry is not None:
            self.refused[token.claims.token_id] = entry
            return "revoked"
        return "accepted"
