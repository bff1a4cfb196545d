"""Watch: one stream for each verifier, which is told of each change as it happens.

A stream sleeps until something has changed or its heartbeat is due; nothing polls. Many streams are at the same place,
so what leads from there to here is made once, as bytes, and sent to all of them. What differs (the age, the number of
the last answer) is a few bytes that follow: two encodings of a message, one after the other, are the two merged
(https://protobuf.dev/programming-guides/encoding/#last-one-wins).

At most `UNANSWERED` responses are on their way to a verifier: it answers each. One that answers none is silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from carnet.admission import Admission
from carnet.errors import CarnetError
from carnet.revocations import Position
from carnet.v1 import trust_pb2
from carnet_broker.core.rollout import VerifierSession
from carnet_broker.core.watching import Hello, HelloError, Push, Standing, is_silent, pushes, standing, told_from
from carnet_broker.edges.grpc.calls import LongCall
from carnet_broker.edges.grpc.ended_streams import EndedStreams
from carnet_broker.edges.grpc.status import BehindError, DrainingError, ReplacedError, SilentError
from carnet_broker.edges.grpc.trust_knowledge import TrustKnowledge, invalid
from carnet_broker.edges.grpc.trust_messages import (
    change_message,
    key_set_message,
    position_message,
    position_of,
)
from carnet_broker.edges.grpc.watch_requests import hello_in, parsed
from carnet_broker.edges.grpc.watch_rules import StreamEvents, WatchRules
from carnet_broker.issuance import Refusal, RefusalReason, RefusedError
from carnet_broker.ports import Acknowledged, Clock, Joined, Left, LogPosition, SessionOutcome
from carnet_broker.revocation_view import RevocationView
from carnet_broker.session_changes import Report
from carnet_broker.signing import KeyringView

__all__ = ["UNANSWERED", "StreamEvents", "WatchRules", "Watchers"]

UNANSWERED: Final = 32
"""Responses on their way to one verifier."""
_RESYNCS: Final = 3
"""How often on one stream a verifier may say that it did not load what it was sent."""
_CACHED: Final = 64
"""Places that what leads from there to here is kept for."""
_JITTER: Final = 0.2
_NUMBERS: Final = itertools.count(1)


@dataclass(eq=False)
class _Stream:
    """One verifier, as long as its stream lasts."""

    identity: str
    hello: Hello
    heard_at: float
    """When it last answered, in monotonic seconds."""
    sent: Position | None
    """Where it is once it has loaded all that was sent."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    number: int = field(default_factory=lambda: next(_NUMBERS))
    """Later streams have higher ones."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    acknowledged: Position | None = None
    count: int = 0
    """Responses that were sent."""
    answered: int = 0
    held_back: bool = False
    """Whether there is more to send than may be on its way."""
    midway: bool = False
    """Whether the last response that was sent is part of a change that goes on."""
    resyncs: int = 0
    joining: bool = False
    joined: bool = False
    """Whether its session is in the store, or on its way there."""
    live: bool = False
    tell: bool = True
    """Whether a response is due although nothing has changed."""
    ended_by: CarnetError | None = None
    """Set where somebody else ends the stream."""
    said_goodbye: bool = False
    is_over: bool = False
    """Whether the verifier sends no more."""

    @property
    def key(self) -> tuple[str, str]:
        """What there is one stream for."""
        return self.identity, self.hello.instance_id

    def end(self, error: CarnetError) -> None:
        """End the stream with `error`."""
        self.ended_by = self.ended_by or error
        self.wake.set()


class Watchers:
    """All streams of this replica. Lives on one event loop."""

    def __init__(
        self,
        known: TrustKnowledge,
        rules: WatchRules,
        clock: Clock,
        admission: Admission,
        events: StreamEvents,
        *,
        report: Report,
    ) -> None:
        """Wire the parts."""
        self.known = known
        self._rules = rules
        self._clock = clock
        self._admission = admission
        self._report_change = report
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._ended = EndedStreams(self._loop, self._tell_left, per_identity=rules.sessions_per_identity)
        self._cache: OrderedDict[tuple[Position | None, int], tuple[LogPosition, list[tuple[Push, bytes]]]]
        self._cache = OrderedDict()
        self._reading: asyncio.Task[None] | None = None
        self._changed_at = 0.0
        self._draining = False

    def __len__(self) -> int:
        return len(self._streams)

    def changed(self) -> None:
        """Wake all streams: keys, revocations, the policy or the bundle have changed. From any thread."""
        self._changed_at = self._clock.mono()
        self._soon(self._wake_all)

    def drain(self) -> None:
        """End all streams, and begin no more. Their sessions stay: the verifiers come back to another replica."""
        self._draining = True
        for stream in self._streams.values():
            stream.end(DrainingError("this replica is shutting down"))

    async def serve(self, call: LongCall) -> None:
        """Serve one stream until it ends. Raises what ended it, where that was not the verifier."""
        workload = call.workload()
        identity = str(workload.spiffe_id)
        retry_after = self._admission.admit(identity, 1, self._clock.mono())
        if retry_after is not None:
            refusal = Refusal(RefusalReason.TOO_MANY_REQUESTS, "too many requests of this workload", retry_after)
            raise RefusedError(refusal)
        hello = hello_in(await call.first())
        self.known.check_serves(workload, hello.audience)
        await self.known.catch_up(hello.position, by=f"{identity} {hello.instance_id}")
        if self._draining:
            msg = "this replica is shutting down"
            raise DrainingError(msg)
        stream = _Stream(identity, hello, self._clock.mono(), hello.position)
        older = self._streams.get(stream.key)
        if older is not None:
            older.end(ReplacedError("a newer stream of this verifier has begun"))
        self._streams[stream.key] = stream
        self._events.streams(len(self._streams))
        reader = asyncio.create_task(self._read(call, stream))
        try:
            await self._write(call, stream)
        finally:
            reader.cancel()
            self._forget(stream)

    def _soon(self, call: Callable[..., None], *arguments: object) -> None:
        """Call on the loop; from any thread, also from one that is still at work when the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)

    def _wake_all(self) -> None:
        for stream in self._streams.values():
            stream.wake.set()
        for identity in self._ended.identities():
            if self.known.is_blocked(identity):
                self._ended.leave_all(identity)

    # -- what comes in ---------------------------------------------------------------------------------------------

    async def _read(self, call: LongCall, stream: _Stream) -> None:
        """Take in what the verifier says, until it says no more."""
        try:
            while (request := await call.next()) is not None:
                message = parsed(request)
                kind = message.WhichOneof("kind")
                if kind == "goodbye":
                    stream.said_goodbye = True
                    self._leave(stream)
                    break
                if kind != "answer":
                    msg = "after the hello there are answers, and one goodbye"
                    raise invalid(msg)
                self._take_answer(stream, message.answer)
        except CarnetError as error:
            stream.end(error)
        stream.is_over = True
        stream.wake.set()

    def _take_answer(self, stream: _Stream, answer: trust_pb2.WatchAnswer) -> None:
        if answer.number != stream.answered + 1 or answer.number > stream.count:
            msg = "number: one answer to each response, in their order"
            raise invalid(msg)
        try:
            position = position_of(answer.position) if answer.HasField("position") else None
        except HelloError as error:
            raise invalid(str(error)) from error
        stream.answered = answer.number
        stream.heard_at = self._clock.mono()
        before, stream.acknowledged = stream.acknowledged, position
        if stream.answered == stream.count and position != stream.sent and not stream.midway:
            self._resync(stream, position)
        elif position is not None:
            self._report(stream, before, position)
        # An answer alone is no reason to say something: most of them follow a push, one from each verifier.
        if stream.held_back or stream.tell:
            stream.wake.set()

    def _resync(self, stream: _Stream, position: Position | None) -> None:
        """Go on from where the verifier says that it is: it did not load what it was sent."""
        stream.resyncs += 1
        if stream.resyncs > _RESYNCS:
            msg = "the verifier does not load what it is sent"
            raise BehindError(msg)
        stream.sent, stream.tell = position, True

    def _report(self, stream: _Stream, before: Position | None, position: Position) -> None:
        """Tell the store how far the verifier is, where that is news."""
        keys = self.known.keys.view
        if before is not None and before.epoch != position.epoch:
            # The store was restored, and has forgotten the session.
            stream.joined = stream.live = False
        if stream.joined:
            news = before is None or (before.generation, before.revocation_version) != (
                position.generation,
                position.revocation_version,
            )
            if news:
                change = Acknowledged(
                    stream.identity,
                    stream.hello.instance_id,
                    stream.id,
                    position.generation,
                    position.revocation_version,
                    timedelta(0),
                )
                loaded_keys = before is None or before.generation != position.generation
                self._report_change(change, soon=loaded_keys)
        elif (
            not stream.joining
            and keys is not None
            and position.generation >= keys.keyring.generation
            and self._ended.admits(*stream.key)
            and not self.known.is_blocked(stream.identity)
        ):
            stream.joining = True
            now = self._clock.now()
            session = VerifierSession(
                spiffe_id=stream.identity,
                instance_id=stream.hello.instance_id,
                audience=stream.hello.audience,
                replica_id=self._rules.replica_id,
                generation=position.generation,
                generation_at=now,
                revocation_version=position.revocation_version,
                revocation_at=now,
                max_staleness=stream.hello.max_staleness,
                polls=stream.hello.accepts_stale,
            )
            self._report_change(
                Joined(session, stream.id),
                lambda outcome: self._soon(self._take_outcome, stream, outcome, position),
            )

    def _take_outcome(self, stream: _Stream, outcome: SessionOutcome, position: Position) -> None:
        """Take in what became of a `Joined`. Where it is not counted, the next answer tries again."""
        self._ended.settled(*stream.key, stream.number, joined=outcome.live)
        stream.joining = False
        stream.joined = outcome.live
        stream.live = outcome.live and not stream.hello.accepts_stale
        keys = self.known.keys.view
        if keys is not None and outcome.required_generation > keys.keyring.generation:
            # Another replica has published a key that this one has not seen.
            self._reading = self._reading or self._loop.create_task(self._read_keyring())
        if not outcome.live:
            return
        stream.tell = True
        stream.wake.set()
        if stream.acknowledged is not None:
            self._report(stream, position, stream.acknowledged)

    async def _read_keyring(self) -> None:
        await self.known.read_keyring()
        self._reading = None

    def _leave(self, stream: _Stream) -> None:
        if stream.joined or stream.joining:
            stream.joined = stream.live = False
            self._tell_left(Left(*stream.key, stream.id), "goodbye" if stream.said_goodbye else "blocked")

    def _tell_left(self, left: Left, why: str = "silent") -> None:
        self._events.left(why)
        self._report_change(left)

    def _forget(self, stream: _Stream) -> None:
        """Let go of a stream that has ended; its session lives on until the verifier could accept nothing any more."""
        if self._streams.get(stream.key) is stream:
            del self._streams[stream.key]
            self._events.streams(len(self._streams))
        if (stream.joined or stream.joining) and not self._draining:
            quiet = self._clock.mono() - stream.heard_at
            left = max(stream.hello.max_staleness.total_seconds() - quiet, 0.0)
            left = 0.0 if self.known.is_blocked(stream.identity) else left
            self._ended.add(*stream.key, stream.number, stream.id, seconds=left)

    # -- what goes out ---------------------------------------------------------------------------------------------

    async def _write(self, call: LongCall, stream: _Stream) -> None:
        """Tell the verifier what there is to tell, until the stream ends."""
        heartbeat_at = self._clock.mono() + self._next_heartbeat()
        queue: list[tuple[Push, bytes]] = []
        while True:
            stream.wake.clear()
            if stream.ended_by is not None:
                raise stream.ended_by
            if stream.is_over:
                return
            workload = call.workload()
            self.known.check_serves(workload, stream.hello.audience)
            if stream.joined and self.known.is_blocked(stream.identity):
                self._leave(stream)
                stream.tell = True
            mono = self._clock.mono()
            if is_silent(stream.heard_at, mono, stream.hello.max_staleness):
                msg = f"the verifier has been silent for {stream.hello.max_staleness}"
                raise SilentError(msg)
            keys, log = self.known.views()
            if not queue:
                queue = self._due(stream, keys, log)
            beats = stream.tell or mono >= heartbeat_at
            if not queue and beats and stream.sent is not None:
                queue = [(Push(stream.sent), b"")]
            while queue and stream.count - stream.answered < UNANSWERED and stream.ended_by is None:
                push, encoded = queue.pop(0)
                await self._send(call, stream, push, encoded, keys, log)
                heartbeat_at = self._clock.mono() + self._next_heartbeat()
            stream.held_back = bool(queue)
            if stream.wake.is_set():
                continue
            mono = self._clock.mono()
            until = min(
                heartbeat_at,
                stream.heard_at + stream.hello.max_staleness.total_seconds(),
                mono + max((workload.not_after - self._clock.now()).total_seconds(), 0.0) + 0.01,
            )
            await _wait_for(stream.wake, until - mono)

    def _due(self, stream: _Stream, keys: KeyringView, log: RevocationView) -> list[tuple[Push, bytes]]:
        """Return what leads the verifier to here, each response with its shared bytes; none where it is here."""
        where = standing(stream.sent, keys.keyring.generation, log.position)
        if where is not Standing.FOLLOWS:
            msg = f"the verifier is {where}"
            raise BehindError(msg)
        sent = told_from(stream.sent, log.tail)
        key = (sent, keys.keyring.generation)
        cached = self._cache.get(key)
        if cached is None or cached[0] != log.position:
            made = pushes(sent, keys.keyring.generation, log.tail, self.known.revocations.snapshot)
            cached = log.position, [(push, self._encoded(push, keys)) for push in made]
            self._cache[key] = cached
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        return list(cached[1])

    def _encoded(self, push: Push, keys: KeyringView) -> bytes:
        """Return the part of a response that is the same for all who get it."""
        message = trust_pb2.WatchResponse(position=position_message(push.position))
        if push.key_set:
            message.key_set.CopyFrom(key_set_message(keys, max_age=self._rules.max_age))
        if push.change is not None:
            message.change.CopyFrom(change_message(push.change))
        return message.SerializeToString()

    async def _send(
        self, call: LongCall, stream: _Stream, push: Push, encoded: bytes, keys: KeyringView, log: RevocationView
    ) -> None:
        now, mono = self._clock.now(), self._clock.mono()
        key_age = max(keys.age(now, mono), timedelta(0))
        message = trust_pb2.WatchResponse(answered=stream.answered, live=stream.live)
        message.age.FromTimedelta(max(key_age, log.age(now, mono)))
        message.heartbeat.FromTimedelta(self._rules.heartbeat)
        if not encoded:
            message.position.CopyFrom(position_message(push.position))
        if push.key_set:
            message.key_set.age.FromTimedelta(key_age)
        stream.count += 1
        stream.tell = False
        stream.midway = push.change is not None and push.change.more
        if not stream.midway:
            stream.sent = push.position
        await call.write(encoded + message.SerializeToString())
        if push.change is None and not push.key_set:
            self._events.pushed("heartbeat", None)
            return
        kind = "revocations" if push.change is not None else "key_set"
        # What it is sent at the beginning is not because of a change.
        since = self._clock.mono() - self._changed_at if stream.acknowledged is not None else None
        self._events.pushed(kind, since)

    def _next_heartbeat(self) -> float:
        # With jitter: streams that began together do not stay together.
        return self._rules.heartbeat.total_seconds() * random.uniform(1 - _JITTER, 1)  # noqa: S311 - no secret


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(max(seconds, 0.0)):
            await event.wait()
    except TimeoutError:
        pass
