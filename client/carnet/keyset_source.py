"""Where a verifier that asks gets its knowledge from: a port, and `GetKeySet` and `GetRevocations` behind it.

Several servers answer the same question. The one that answered last is asked first; one that cannot answer, answers
nonsense, or lags behind what the verifier has, is passed over for the next. All of it happens within one time limit.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Generic, Protocol, TypeVar

import grpc
import grpc.aio

from carnet.endpoints import Failover, Target
from carnet.errors import InvalidKeySetError, KeySetUnavailableError
from carnet.jwk import KeySet
from carnet.keysets import KeySetSnapshot, Moment
from carnet.revocations import Position
from carnet.trust_messages import PartCollector, RefusedResponseError, Response
from carnet.trust_servers import (
    AsyncTrustChannels,
    TrustChannels,
    TrustServers,
    code_of,
    describe,
    read_clocks,
    remedy,
)
from carnet.trust_state import MAX_GENERATION_JUMP
from carnet.trust_wire import polled_response, position_message
from carnet.v1.trust_pb2 import GetKeySetRequest, GetKeySetResponse, GetRevocationsRequest, GetRevocationsResponse
from carnet.v1.trust_pb2_grpc import TrustServiceStub

__all__ = [
    "AsyncKeySetSource",
    "AsyncRevocationSource",
    "AsyncTrustServiceSource",
    "KeySetSource",
    "Polled",
    "PolledParts",
    "RevocationSource",
    "TrustServers",
    "TrustServiceSource",
]

_log: Final = logging.getLogger("carnet.trust")

_SHORTEST_SHARE: Final = 0.5
"""Seconds that one server gets at least, if so much is left: a connection over mutual TLS takes part of it."""

_Answer = TypeVar("_Answer")
_Result = TypeVar("_Result")


class KeySetSource(Protocol):
    """Fetches the key set, for threads. One call at a time."""

    def fetch(self, missing_kid: str | None, *, at_least: int) -> KeySetSnapshot:
        """Return the set as it is now; `missing_kid` is the key that is missed, if one is.

        An answer below generation `at_least` is no answer. Raises `KeySetUnavailableError` within a bounded time.
        """

    def close(self) -> None:
        """Give back what is held. May be called while a `fetch` is under way, which then fails."""


class AsyncKeySetSource(Protocol):
    """Fetches the key set, for asyncio. One call at a time."""

    async def fetch(self, missing_kid: str | None, *, at_least: int) -> KeySetSnapshot:
        """Do what `KeySetSource.fetch` does."""

    async def close(self) -> None:
        """Do what `KeySetSource.close` does."""


@dataclass(frozen=True, slots=True)
class Polled:
    """What an issuer told of revocations when it was asked."""

    response: Response
    asked_at: Moment


class PolledParts:
    """The answer of one server to a poll, taken in while it comes: one that is too long is not waited for."""

    def __init__(self) -> None:
        self._parts = PartCollector()
        self._whole: Response | None = None

    def add(self, answer: GetRevocationsResponse, now: Moment) -> None:
        """Take the next message in. Raises `RefusedResponseError`: then the rest is not worth having."""
        if self._whole is not None:
            msg = "its answer goes on after its end"
            raise RefusedResponseError(msg)
        whole = self._parts.add(polled_response(answer), now, now)
        self._whole = None if whole is None else whole[0]

    def whole(self) -> Response:
        """Return the answer. Raises `RefusedResponseError` where its end did not come."""
        if self._whole is None:
            msg = "its answer has no end"
            raise RefusedResponseError(msg)
        return self._whole


class RevocationSource(Protocol):
    """Fetches revocations, for threads. One call at a time."""

    def fetch_revocations(self, since: Position | None) -> Polled | None:
        """Return what was revoked after `since`, None where the servers are of a version that does not tell.

        An answer from before `since` is no answer. Raises `KeySetUnavailableError` within a bounded time.
        """


class AsyncRevocationSource(Protocol):
    """Fetches revocations, for asyncio. One call at a time."""

    async def fetch_revocations(self, since: Position | None) -> Polled | None:
        """Do what `RevocationSource.fetch_revocations` does."""


class TrustServiceSource:
    """A `KeySetSource` and a `RevocationSource` over ``carnet.v1.TrustService``. Connects at the first fetch."""

    def __init__(self, servers: TrustServers, channels: TrustChannels | None = None) -> None:
        self._servers = servers
        self._failover = _failover(servers)
        self._channels = channels or TrustChannels(servers)

    def fetch(self, missing_kid: str | None, *, at_least: int) -> KeySetSnapshot:
        """Ask the servers in turn. See `KeySetSource`."""
        request = GetKeySetRequest(missing_key_id=missing_kid or "")
        asking = _Round("a key set", self._servers, self._failover, _key_set_reader(at_least))
        for attempt in asking.attempts():
            try:
                stub = TrustServiceStub(self._channels.get(attempt.target))
                attempt.answer = stub.GetKeySet(request, timeout=attempt.timeout)
            except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed.
                attempt.error = error
        return asking.result()

    def fetch_revocations(self, since: Position | None) -> Polled | None:
        """Ask the servers in turn. See `RevocationSource`."""
        request = GetRevocationsRequest(**_from(since))
        asking = _Round("revocations", self._servers, self._failover, _revocations_reader(since))
        for attempt in asking.attempts():
            parts, call = PolledParts(), None
            try:
                stub = TrustServiceStub(self._channels.get(attempt.target))
                call = stub.GetRevocations(request, timeout=attempt.timeout)
                for answer in call:
                    parts.add(answer, read_clocks())
                attempt.answer = parts.whole()
            except (grpc.RpcError, RefusedResponseError, ValueError) as error:
                attempt.error = error
            finally:
                if call is not None:
                    call.cancel()  # Does nothing to one that has ended.
        return None if asking.unimplemented else asking.result()

    def close(self) -> None:
        """Close the connections."""
        self._channels.close()


class AsyncTrustServiceSource:
    """What `TrustServiceSource` is, for the event loop of its first fetch."""

    def __init__(self, servers: TrustServers, channels: AsyncTrustChannels | None = None) -> None:
        self._servers = servers
        self._failover = _failover(servers)
        self._channels = channels or AsyncTrustChannels(servers)

    async def fetch(self, missing_kid: str | None, *, at_least: int) -> KeySetSnapshot:
        """Ask the servers in turn. See `AsyncKeySetSource`."""
        request = GetKeySetRequest(missing_key_id=missing_kid or "")
        asking = _Round("a key set", self._servers, self._failover, _key_set_reader(at_least))
        for attempt in asking.attempts():
            try:
                stub = TrustServiceStub(self._channels.get(attempt.target))
                attempt.answer = await stub.GetKeySet(request, timeout=attempt.timeout)
            except (grpc.RpcError, grpc.aio.UsageError) as error:  # UsageError: the channel was closed.
                attempt.error = error
        return asking.result()

    async def fetch_revocations(self, since: Position | None) -> Polled | None:
        """Ask the servers in turn. See `AsyncRevocationSource`."""
        request = GetRevocationsRequest(**_from(since))
        asking = _Round("revocations", self._servers, self._failover, _revocations_reader(since))
        for attempt in asking.attempts():
            parts, call = PolledParts(), None
            try:
                stub = TrustServiceStub(self._channels.get(attempt.target))
                call = stub.GetRevocations(request, timeout=attempt.timeout)
                async for answer in call:
                    parts.add(answer, read_clocks())
                attempt.answer = parts.whole()
            except (grpc.RpcError, RefusedResponseError, grpc.aio.UsageError) as error:
                attempt.error = error
            finally:
                if call is not None:
                    call.cancel()
        return None if asking.unimplemented else asking.result()

    async def close(self) -> None:
        """Close the connections."""
        await self._channels.close()


@dataclass(slots=True)
class _Attempt(Generic[_Answer]):
    """One question to one server; whoever asks puts in what came of it."""

    target: Target
    timeout: float
    answer: _Answer | None = None
    error: Exception | None = None


class _Round(Generic[_Answer, _Result]):
    """One fetch over several servers, for both stacks: whom to ask, for how long, and what to make of the answers."""

    def __init__(
        self, what: str, servers: TrustServers, failover: Failover, read: Callable[[_Answer, Moment], _Result]
    ) -> None:
        self._what = what
        self._servers = servers
        self._failover = failover
        self._read = read
        self._result: list[_Result] = []
        self._failures: list[str] = []
        self._cause: Exception | None = None
        self.unimplemented = False
        """Whether no server gave an answer, and one of them does not know the question."""

    def attempts(self) -> Iterator[_Attempt[_Answer]]:
        """Yield one attempt after the other until one has led to a usable answer, or the time is over."""
        end = time.monotonic() + self._servers.timeout.total_seconds()
        order = self._failover.order(time.monotonic())
        for position, target in enumerate(order):
            left = end - time.monotonic()
            if left <= 0:
                self._failures.append(f"{len(order) - position} more were not asked for lack of time")
                return
            asked_at = read_clocks()
            attempt = _Attempt[_Answer](target, max(left / (len(order) - position), min(left, _SHORTEST_SHARE)))
            yield attempt
            try:
                self._result.append(self._read(_answer_of(attempt), asked_at))
            except (InvalidKeySetError, KeySetUnavailableError, RefusedResponseError) as error:
                self.unimplemented |= code_of(attempt.error) is grpc.StatusCode.UNIMPLEMENTED
                self._failover.failed(target, time.monotonic())
                self._failures.append(f"{target}: {error}")
                self._cause = attempt.error or error
                if isinstance(error, RefusedResponseError):  # Of a server that is down all others know.
                    _log.warning("%s was asked for %s, and what it said is not taken: %s", target, self._what, error)
            else:
                self.unimplemented = False
                self._failover.succeeded(target)
                return

    def result(self) -> _Result:
        """Return the answer. Raises `KeySetUnavailableError`, which says what each server did."""
        if self._result:
            return self._result[0]
        texts = "; ".join(self._failures)
        msg = f"no trust server gave {self._what} ({texts}); {remedy(texts, self._servers)}"
        raise KeySetUnavailableError(msg) from self._cause


def _answer_of(attempt: _Attempt[_Answer]) -> _Answer:
    if isinstance(attempt.error, RefusedResponseError):
        raise attempt.error
    if attempt.answer is None:
        msg = describe(attempt.error)
        raise KeySetUnavailableError(msg)
    return attempt.answer


def _failover(servers: TrustServers) -> Failover:
    # Spread over the servers, so that verifiers which start together do not all ask the same one.
    return Failover(servers.targets, first=random.randrange(len(servers.targets)))  # noqa: S311


def _from(since: Position | None) -> dict[str, object]:
    return {} if since is None else {"from": position_message(since)}  # A word of Python, so not by its name.


def _key_set_reader(at_least: int) -> Callable[[GetKeySetResponse, Moment], KeySetSnapshot]:
    def read(answer: GetKeySetResponse, asked_at: Moment) -> KeySetSnapshot:
        if answer.generation < at_least:
            msg = f"it has generation {answer.generation}, and {at_least} is loaded"
            raise KeySetUnavailableError(msg)
        if at_least and answer.generation - at_least > MAX_GENERATION_JUMP:
            msg = (
                f"it names generation {answer.generation}, {at_least} is loaded, and it cannot have had more than"
                f" {MAX_GENERATION_JUMP} since; if this process was suspended for months, start it anew"
            )
            raise RefusedResponseError(msg)
        return KeySetSnapshot(
            issuer=answer.issuer,
            generation=answer.generation,
            keys=KeySet.parse(answer.jwks),
            max_age=_time(answer.max_age.ToTimedelta),
            age=_time(answer.age.ToTimedelta),
            asked_at=asked_at,
        )

    return read


def _revocations_reader(since: Position | None) -> Callable[[Response, Moment], Polled]:
    def read(answer: Response, asked_at: Moment) -> Polled:
        told = answer.position
        if since is not None and (told.epoch, told.revocation_version) < (since.epoch, since.revocation_version):
            msg = f"it has revocation {told.revocation_version}, and {since.revocation_version} is loaded"
            raise KeySetUnavailableError(msg)
        return Polled(answer, asked_at)

    return read


def _time(convert: Callable[[], timedelta]) -> timedelta:
    try:
        return convert()
    except (ValueError, OverflowError) as error:
        msg = "its times are out of range"
        raise InvalidKeySetError(msg) from error
