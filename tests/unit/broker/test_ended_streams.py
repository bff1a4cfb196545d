"""Verifiers whose stream has ended: how long they are counted, and what one that reconnects in a loop can fill."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from carnet.revocations import GENESIS_DIGEST, Revocation, RevocationKind
from carnet.spiffe import SpiffeID
from carnet.v1 import trust_pb2
from carnet_broker.edges.grpc.ended_streams import EndedStreams
from carnet_broker.edges.grpc.trust_knowledge import TrustKnowledge
from carnet_broker.edges.grpc.watch import Watchers, WatchRules
from carnet_broker.ports import Joined, Left, LogPosition, RevocationPage, SessionChange, SessionOutcome
from carnet_broker.revocation_view import RevocationHolder

T0 = datetime(2026, 11, 24, 12, tzinfo=UTC)
PAYMENTS = "spiffe://prod.example/ns/shop/sa/payments"
OTHER = "spiffe://prod.example/ns/shop/sa/other"
PER_IDENTITY = 5
LIVE = SessionOutcome(live=True)
ADMITS_ALL: Any = SimpleNamespace(admit=lambda *_: None)
ANY_PATTERN = SimpleNamespace(matches=lambda _: True)


class RunningClock:
    """The real time, from T0."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def now(self) -> datetime:
        """Return the wall time."""
        return T0 + timedelta(seconds=self.mono() - self._start)

    def mono(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()


class Call:
    """A stream of a verifier that says hello, answers what it gets, and breaks off when it is told that it is live."""

    def __init__(self, identity: str, instance: str, until: Callable[[trust_pb2.WatchResponse], bool]) -> None:
        self._identity = identity
        self._until = until
        self._requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.responses: list[trust_pb2.WatchResponse] = []
        hello = trust_pb2.WatchHello(instance_id=instance, audience="payments")
        hello.max_staleness.FromTimedelta(timedelta(days=1))
        self._requests.put_nowait(trust_pb2.WatchRequest(hello=hello).SerializeToString())

    def workload(self) -> Any:  # noqa: ANN401 - as much of a workload as streams use
        """Who calls."""
        return SimpleNamespace(spiffe_id=SpiffeID.parse(self._identity), not_after=T0 + timedelta(days=9))

    async def first(self) -> bytes:
        """Its hello."""
        request = await self._requests.get()
        assert request is not None
        return request

    async def next(self) -> bytes | None:
        """Its next request."""
        return await self._requests.get()

    async def write(self, encoded: bytes) -> None:
        """Take a response, and answer it or end."""
        response = trust_pb2.WatchResponse.FromString(encoded)
        self.responses.append(response)
        answer = trust_pb2.WatchAnswer(number=len(self.responses), position=response.position)
        self._requests.put_nowait(trust_pb2.WatchRequest(answer=answer).SerializeToString())
        if self._until(response):
            self._requests.put_nowait(None)


class Place:
    """The streams of a broker over a store that tells each join what `outcome` says."""

    def __init__(self) -> None:
        self.clock = RunningClock()
        self.said: list[SessionChange] = []
        self.left: list[str] = []
        self.outcome = LIVE
        keyring = SimpleNamespace(generation=3, issuer="https://tokens.prod.example")
        view: Any = SimpleNamespace(keyring=keyring, jwks="{}", age=lambda *_: timedelta(0))
        self.revocations = RevocationHolder()
        self.take([], 0)
        policy: Any = SimpleNamespace(audiences={"payments": SimpleNamespace(served_by=[ANY_PATTERN])})
        unasked: Any = None
        known = TrustKnowledge(
            keys=SimpleNamespace(view=view),  # type: ignore[arg-type] # as much of a holder as streams use
            revocations=self.revocations,
            policy=lambda: policy,
            clock=self.clock,
            max_staleness=timedelta(minutes=5),
            read_keyring=unasked,
            read_store=unasked,
        )
        rules = WatchRules(
            replica_id="one",
            heartbeat=timedelta(seconds=0.02),
            max_age=timedelta(minutes=1),
            sessions_per_identity=PER_IDENTITY,
        )
        events: Any = SimpleNamespace(streams=lambda _: None, pushed=lambda *_: None, left=self.left.append)
        self.watchers = Watchers(known, rules, self.clock, ADMITS_ALL, events, report=self._report)

    def take(self, entries: list[Revocation], version: int) -> None:
        """Have read those revocations."""
        page = RevocationPage(
            LogPosition(1, version, GENESIS_DIGEST), snapshot=True, entries=tuple(entries), read_at=T0
        )
        self.revocations.take(page, now=self.clock.now(), mono=self.clock.mono())

    def _report(
        self, change: SessionChange, told: Callable[[SessionOutcome], None] | None = None, *, soon: bool = True
    ) -> None:
        del soon
        self.said.append(change)
        if told is not None:
            told(self.outcome)

    async def connect(self, instance: str, identity: str = PAYMENTS) -> Call:
        """Watch until counted, or for four responses; then break the stream off without a goodbye."""
        call = Call(identity, instance, lambda one: one.live or one.answered >= 3)
        async with asyncio.timeout(5):
            await self.watchers.serve(call)  # type: ignore[arg-type] # as much of a call as it uses
        return call

    @property
    def joined(self) -> list[str]:
        """The instances that the store was told of."""
        return [change.session.instance_id for change in self.said if isinstance(change, Joined)]


@pytest.fixture(name="place")
async def _place() -> Place:
    """Streams on the loop of the test."""
    return Place()


async def test_a_verifier_that_reconnects_in_a_loop_is_kept_once(place: Place):
    """It is the newest of its streams that the store knows: those before it have nothing left to say."""
    for _ in range(30):
        call = await place.connect("same")
        assert call.responses[-1].live
    assert 1 == len(place.watchers._ended)
    assert [] == place.left, "its max_staleness is a day, and it is counted for that long"


async def test_one_with_ever_new_names_takes_the_count_from_itself_alone(place: Place):
    """Beyond the bound its streams are told everything and not counted; nobody is forgotten, and others are counted."""
    calls = [await place.connect(f"name-{number}") for number in range(30)]
    assert [f"name-{number}" for number in range(PER_IDENTITY)] == place.joined
    assert PER_IDENTITY == len(place.watchers._ended)
    assert all(call.responses[0].HasField("key_set") for call in calls)
    assert not calls[-1].responses[-1].live
    assert [] == [change for change in place.said if isinstance(change, Left)]
    # One of those that are counted comes back, and so does a verifier of somebody else.
    assert (await place.connect("name-0")).responses[-1].live
    assert (await place.connect("first", OTHER)).responses[-1].live


async def test_a_stream_that_ends_before_it_is_counted_is_kept_no_longer_than_that(place: Place):
    """The store says that it does not count it: then there is nobody to leave."""
    place.outcome = SessionOutcome(live=False)
    await place.connect("uncounted")
    await asyncio.sleep(0)
    assert 0 == len(place.watchers._ended)


async def test_a_block_ends_the_count_of_those_whose_stream_has_ended(place: Place):
    """At once: whoever holds the blocked identity holds up no rotation; a verifier of somebody else stays counted."""
    await place.connect("gone")
    await place.connect("stays", OTHER)
    place.take([Revocation(1, RevocationKind.BLOCK, PAYMENTS, 1, None)], 1)
    place.watchers.changed()
    await asyncio.sleep(0.02)
    assert ["gone"] == [change.instance_id for change in place.said if isinstance(change, Left)]
    assert 1 == len(place.watchers._ended)
    # And no further one is counted.
    assert not (await place.connect("next")).responses[-1].live
    assert ["gone", "stays"] == place.joined


# -- the record of them ------------------------------------------------------------------------------------------------


async def test_an_ended_stream_leaves_when_its_time_is_over():
    """With the name that it had in the store, once."""
    left: list[Left] = []
    ended = EndedStreams(asyncio.get_running_loop(), left.append, per_identity=2)
    ended.add(PAYMENTS, "one", 1, "stream-1", seconds=0.01)
    ended.add(PAYMENTS, "two", 2, "stream-2", seconds=9.0)
    await asyncio.sleep(0.05)
    assert [Left(PAYMENTS, "one", "stream-1")] == left
    assert [PAYMENTS] == ended.identities()
    ended.leave_all(PAYMENTS)
    assert [Left(PAYMENTS, "two", "stream-2")] == left[1:]
    assert [] == ended.identities()


async def test_a_later_stream_takes_the_place_of_earlier_ones_only_when_it_has_joined():
    """Until then the earlier one is what the store has; an answer that comes late ends none that came after it."""
    left: list[Left] = []
    ended = EndedStreams(asyncio.get_running_loop(), left.append, per_identity=2)
    for number in (1, 2, 3):
        ended.add(PAYMENTS, "one", number, f"stream-{number}", seconds=9.0)
    ended.settled(PAYMENTS, "one", 2, joined=True)
    assert 2 == len(ended)
    ended.settled(PAYMENTS, "one", 3, joined=False)
    ended.settled(PAYMENTS, "one", 4, joined=False)
    ended.leave_all(PAYMENTS)
    assert [Left(PAYMENTS, "one", "stream-2")] == left
    ended.settled(OTHER, "one", 9, joined=True)
    ended.leave_all(OTHER)
    assert 1 == len(left)
