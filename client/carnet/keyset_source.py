"""Where a verifier gets the key set from: a port, and `TrustService.GetKeySet` behind it.

Several servers answer the same question. The one that answered last is asked first; one that cannot answer, answers
nonsense, or lags behind the generation that the verifier has, is passed over for the next. All of it happens within one
time limit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

import grpc
import grpc.aio

from carnet.endpoints import Failover, Target
from carnet.errors import InvalidKeySetError, KeySetUnavailableError
from carnet.identity import Identity
from carnet.jwk import KeySet
from carnet.keysets import KeySetSnapshot, Moment
from carnet.tls import secure_aio_channel, secure_channel
from carnet.v1.trust_pb2 import GetKeySetRequest, GetKeySetResponse
from carnet.v1.trust_pb2_grpc import TrustServiceStub

__all__ = [
    "AsyncKeySetSource",
    "AsyncTrustServiceSource",
    "KeySetSource",
    "TrustServers",
    "TrustServiceSource",
    "read_clocks",
]

_SHOWN: Final = 300
"""Characters of what a server says."""

_SHORTEST_SHARE: Final = 0.5
"""Seconds that one server gets at least, if so much is left: a connection over mutual TLS takes part of it."""


def read_clocks() -> Moment:
    """Return the moment that it is. The one place where the verifier reads a clock."""
    return Moment(time.monotonic(), datetime.now(UTC))


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
class TrustServers:
    """How the trust listeners of the brokers are reached. They want mutual TLS, so an identity is needed."""

    targets: Sequence[Target]
    identity: Identity
    ca_pem: bytes
    server_name: str
    """The DNS name that their certificates carry."""
    timeout: timedelta
    """For the whole of one fetch, whatever the number of servers."""


class TrustServiceSource:
    """A `KeySetSource` over ``carnet.v1.TrustService``. Connects at the first fetch."""

    def __init__(self, servers: TrustServers) -> None:
        self._servers = servers
        self._round = _Round(servers)
        self._channels: dict[Target, grpc.Channel] = {}

    def fetch(self, missing_kid: str | None, *, at_least: int) -> KeySetSnapshot:
        """Ask the servers in turn. See `KeySetSource`."""
        for attempt in self._round.attempts(missing_kid, at_least=at_least):
            try:
                stub = TrustServiceStub(self._channel(attempt.target))
                attempt.answer = stub.GetKeySet(attempt.request, timeout=attempt.timeout)
            except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed.
                attempt.error = error
        return self._round.result()

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.copy().values():
            channel.close()

    def _channel(self, target: Target) -> grpc.Channel:
        channel = self._channels.get(target)
        if channel is None:
            servers = self._servers
            channel = self._channels[target] = secure_channel(
                target, identity=servers.identity, ca_pem=servers.ca_pem, server_name=servers.server_name
            )
        return channel


class AsyncTrustServiceSource:
    """An `AsyncKeySetSource` over ``carnet.v1.TrustService``. Belongs to the event loop of its first fetch."""

    def __init__(self, servers: TrustServers) -> None:
        self._servers = servers
        self._round = _Round(servers)
        self._channels: dict[Target, grpc.aio.Channel] = {}

    async def fetch(self, missing_kid: str | None, *, at_least: int) -> KeySetSnapshot:
        """Ask the servers in turn. See `AsyncKeySetSource`."""
        for attempt in self._round.attempts(missing_kid, at_least=at_least):
            try:
                stub = TrustServiceStub(self._channel(attempt.target))
                attempt.answer = await stub.GetKeySet(attempt.request, timeout=attempt.timeout)
            except (grpc.RpcError, grpc.aio.UsageError) as error:  # UsageError: the channel was closed.
                attempt.error = error
        return self._round.result()

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.copy().values():
            await channel.close()

    def _channel(self, target: Target) -> grpc.aio.Channel:
        channel = self._channels.get(target)
        if channel is None:
            servers = self._servers
            channel = self._channels[target] = secure_aio_channel(
                target, identity=servers.identity, ca_pem=servers.ca_pem, server_name=servers.server_name
            )
        return channel


@dataclass(slots=True)
class _Attempt:
    """One question to one server; whoever asks puts in what came of it."""

    target: Target
    request: GetKeySetRequest
    timeout: float
    answer: GetKeySetResponse | None = None
    error: Exception | None = None


class _Round:
    """One fetch over several servers, for both stacks: whom to ask, for how long, and what to make of the answers."""

    def __init__(self, servers: TrustServers) -> None:
        self._servers = servers
        # Spread over the servers, so that verifiers which start together do not all ask the same one.
        self._failover = Failover(servers.targets, first=random.randrange(len(servers.targets)))  # noqa: S311
        self._result: KeySetSnapshot | None = None
        self._failures: list[str] = []
        self._cause: Exception | None = None

    def attempts(self, missing_kid: str | None, *, at_least: int) -> Iterator[_Attempt]:
        """Yield one attempt after the other until one has led to a usable answer, or the time is over."""
        self._result, self._failures, self._cause = None, [], None
        request = GetKeySetRequest(missing_key_id=missing_kid or "")
        end = time.monotonic() + self._servers.timeout.total_seconds()
        order = self._failover.order(time.monotonic())
        for position, target in enumerate(order):
            left = end - time.monotonic()
            if left <= 0:
                self._failures.append(f"{len(order) - position} more were not asked for lack of time")
                return
            asked_at = read_clocks()
            attempt = _Attempt(target, request, max(left / (len(order) - position), min(left, _SHORTEST_SHARE)))
            yield attempt
            try:
                self._result = _snapshot(attempt, asked_at, at_least=at_least)
            except (InvalidKeySetError, KeySetUnavailableError) as error:
                self._failover.failed(target, time.monotonic())
                self._failures.append(f"{target}: {error}")
                self._cause = attempt.error or error
            else:
                self._failover.succeeded(target)
                return

    def result(self) -> KeySetSnapshot:
        """Return the answer. Raises `KeySetUnavailableError`, which says what each server did."""
        if self._result is not None:
            return self._result
        texts = "; ".join(self._failures)
        msg = f"no trust server gave a key set ({texts}); {_remedy(texts, self._servers)}"
        raise KeySetUnavailableError(msg) from self._cause


def _snapshot(attempt: _Attempt, asked_at: Moment, *, at_least: int) -> KeySetSnapshot:
    answer = attempt.answer
    if answer is None:
        msg = f"{_describe(attempt.error)}"
        raise KeySetUnavailableError(msg)
    if answer.generation < at_least:
        msg = f"it has generation {answer.generation}, and {at_least} is loaded"
        raise KeySetUnavailableError(msg)
    try:
        max_age, age = answer.max_age.ToTimedelta(), answer.age.ToTimedelta()
    except (ValueError, OverflowError) as error:
        msg = "its times are out of range"
        raise InvalidKeySetError(msg) from error
    return KeySetSnapshot(
        issuer=answer.issuer,
        generation=answer.generation,
        keys=KeySet.parse(answer.jwks),
        max_age=max_age,
        age=age,
        asked_at=asked_at,
    )


def _describe(error: Exception | None) -> str:
    if isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        details = error.details() or ""
        return f"{error.code().name} {details[:_SHOWN]}"
    return "the connection is closed"


def _remedy(texts: str, servers: TrustServers) -> str:
    """Say what to do about it, from what the servers did and what this side knows."""
    ended_at = servers.identity.not_after
    # gRPC says "Socket closed" when a server refuses the certificate: the likeliest reason is known here.
    if ended_at < datetime.now(UTC):
        return f"the own certificate ended at {ended_at:%Y-%m-%dT%H:%M:%SZ}, check CARNET_CERT_FILE"
    for sign, remedy in (
        ("UNIMPLEMENTED", "this is no trust listener (that for tokens has a port of its own), check CARNET_TRUST"),
        (
            "CERTIFICATE_VERIFY_FAILED",
            "the certificate there has ended or is not from your authorities, check CARNET_CA_FILE",
        ),
        (
            "Hostname Verification",
            f"the certificate there is not for {servers.server_name}, check CARNET_TRUST and CARNET_BROKER_NAME",
        ),
        (
            "Socket closed",
            "the broker may not trust your certificate, check CARNET_CERT_FILE and the broker's CA file",
        ),
    ):
        if sign in texts:
            return remedy
    return "check CARNET_TRUST, and that a broker runs there and is ready"
