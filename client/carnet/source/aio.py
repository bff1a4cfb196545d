"""`AsyncClient`: tokens for asyncio.

A request is a task of its own that no caller owns: a caller that is cancelled, or whose time runs out, leaves it to the
others. Refreshes are started by one timer of the event loop; there is no task that runs for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Final, Self, TypeAlias, cast

import grpc
import grpc.aio

from carnet.cache import CacheSettings, Failure, Fetch, Held, Issued, Join, Ready, TokenCache, TokenKey
from carnet.endpoints import Target
from carnet.identity import Identity, StrPath
from carnet.source.connections import Connections
from carnet.source.flight import Flight
from carnet.source.options import ClientOptions, check_key, new_rng, token_key
from carnet.source.wire import Miss, issue_request, issued, miss_of
from carnet.tls import secure_aio_channel
from carnet.token import Token
from carnet.v1 import token_pb2_grpc

__all__ = ["AsyncClient"]

_log: Final = logging.getLogger("carnet")
_CLOSED: Final = Failure("the client was closed")

_InFlight: TypeAlias = tuple[Flight, asyncio.Task[Token | Failure]]
"""One request, and the task that those who wait for it wait for."""


class AsyncClient:
    """A source of tokens for one workload, for asyncio. Takes the arguments and the environment of `Client`.

    It belongs to the event loop that uses it first; once that is closed it may go on in another, with the tokens that
    it has. It may be made outside of a loop, and before a fork.
    """

    def __init__(
        self,
        *,
        brokers: str | Iterable[str] | None = None,
        broker_name: str | None = None,
        identity: Identity | None = None,
        cert_file: StrPath | None = None,
        key_file: StrPath | None = None,
        ca_file: StrPath | None = None,
        timeout: timedelta = timedelta(seconds=10),
        attempt_timeout: timedelta = timedelta(seconds=3),
        cache: CacheSettings | None = None,
    ) -> None:
        self._options = ClientOptions.read(
            brokers=brokers,
            broker_name=broker_name,
            identity=identity,
            cert_file=cert_file,
            key_file=key_file,
            ca_file=ca_file,
            timeout=timeout,
            attempt_timeout=attempt_timeout,
            cache=cache,
        )
        self._engine: _Engine | None = None
        self._parents: list[_Engine] = []
        self._closed = False

    @property
    def identity(self) -> Identity:
        """The certificate and key that tokens are asked for with, unless a call names others."""
        return self._options.identity

    @property
    def ca_pem(self) -> bytes:
        """The authorities that the broker is checked by."""
        return self._options.ca_pem

    async def get_token(
        self,
        audience: str,
        *,
        scopes: Iterable[str] = (),
        ttl: timedelta | None = None,
        identity: Identity | None = None,
        timeout: timedelta | None = None,  # noqa: ASYNC109 - the cache decides what a caller whose time ran out is told
    ) -> Token:
        """Return a valid token for `audience`; what `Client.get_token` says holds here too.

        A token that is cached and valid comes without giving up control to the loop. Raises `RuntimeError` where the
        client is in use in another loop.
        """
        wait = self._options.timeout if timeout is None else timeout
        identity = identity or self._options.identity
        return await self._engine_here().get(token_key(identity, audience, scopes, ttl), identity, wait)

    async def close(self) -> None:
        """End requests, connections and the timer. Callers that wait get `BrokerUnavailableError`."""
        self._closed = True
        if self._engine is not None and self._engine.is_here():
            await self._engine.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        brokers = ",".join(map(str, self._options.brokers))
        return f"<AsyncClient {self._options.identity.spiffe_id} brokers={brokers}>"

    def _engine_here(self) -> _Engine:
        if self._closed:
            raise _CLOSED.error()
        engine = self._engine
        if engine is None:
            engine = self._engine = _Engine(self._options, self._options.new_cache())
        elif not engine.is_here():
            if engine.is_of_this_process() and not engine.is_over():
                msg = (
                    "an AsyncClient belongs to one event loop, and another one that still runs uses this: make one each"
                )
                raise RuntimeError(msg)
            if not engine.is_of_this_process():
                self._parents.append(
                    engine
                )  # In the child of a fork gRPC's objects may not be touched, not even freed.
            engine = self._engine = engine.for_this_loop()
        return engine


class _Engine:
    """All of a client that must not leave its event loop."""

    def __init__(self, options: ClientOptions, cache: TokenCache) -> None:
        self._options = options
        self._cache = cache
        self._failover = options.new_failover()
        self._connections = Connections(self._open)
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._flights: dict[TokenKey, _InFlight] = {}
        self._identities: dict[str, Identity] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._ended = self._loop.create_future()
        """Done when the client is closed; who waits for time to pass waits for this as well."""

    def is_of_this_process(self) -> bool:
        """Whether no fork lies between this engine and the caller."""
        return self._pid == os.getpid()

    def is_here(self) -> bool:
        """Whether this engine belongs to the running loop, of this process."""
        return self._loop is asyncio.get_running_loop() and self.is_of_this_process()

    def is_over(self) -> bool:
        """Whether its loop is closed."""
        return self._loop.is_closed()

    def for_this_loop(self) -> _Engine:
        """Return an engine for the running loop, with the tokens of this one."""
        engine = _Engine(self._options, self._cache.copy_idle(new_rng()))
        engine._identities.update(self._identities)
        engine._schedule()
        return engine

    async def get(self, key: TokenKey, identity: Identity, timeout: timedelta) -> Token:  # noqa: ASYNC109 - see above
        """Return a token for `key`, waiting at most `timeout`."""
        mono = time.monotonic()
        token = self._cache.fresh(key, mono=mono, now=datetime.now(UTC))
        if token is not None:
            return token
        deadline = mono + timeout.total_seconds()
        while True:
            got = self._ask(key, identity, deadline)
            if isinstance(got, Token):
                return got
            if isinstance(got, float):
                await asyncio.wait({self._ended}, timeout=got)
                if self._ended.done():
                    raise _CLOSED.error()
                continue
            flight, task = got
            # wait() and not wait_for(): neither a timeout nor a cancelled caller ends the task, which others share.
            await asyncio.wait({task}, timeout=max(deadline - time.monotonic(), 0.0))
            if not task.done():
                raise flight.late(timeout, datetime.now(UTC)).error()
            ended = _CLOSED if task.cancelled() else task.result()
            if isinstance(ended, Token):
                return ended
            if ended.reason is not None or self._ended.done() or time.monotonic() >= deadline:
                raise ended.error()

    def _ask(self, key: TokenKey, identity: Identity, deadline: float) -> Token | _InFlight | float:
        """Return the token, or the request to wait for, or the seconds after which to ask again."""
        mono = time.monotonic()
        match self._cache.ask(key, mono=mono, now=datetime.now(UTC)):
            case Ready(token, due):
                if due:
                    self._refresh()
                return token
            case Held(failure, until):
                if failure.reason is not None or until > deadline:
                    raise failure.error()
                return until - mono
            case Join():
                return self._flights[key]
            case Fetch():
                check_key(key)
                self._identities[key.thumbprint] = identity
                return self._begin(key, mono, background=False)

    async def close(self) -> None:
        """End everything."""
        if not self._ended.done():
            self._ended.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        tasks = [task for _, task in self._flights.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._close(self._connections.keep(()))
        if self._closing:
            await asyncio.wait(self._closing)

    def _begin(self, key: TokenKey, mono: float, *, background: bool) -> _InFlight:
        """Start the request for `key`, which the cache allows."""
        self._cache.begin(key, mono=mono)
        identity, targets = self._identities[key.thumbprint], self._failover.order(mono)
        flight = Flight(key, identity, self._options.broker_name, targets, background)
        task = self._loop.create_task(self._fly(flight))
        task.add_done_callback(partial(self._landed, flight))
        self._flights[key] = flight, task
        return flight, task

    async def _fly(self, flight: Flight) -> Token | Failure:
        """Ask one broker after the other; `_landed` follows, even where this was cancelled before it began."""
        ended: Issued | Failure | None = None
        while ended is None:
            result = await self._call(flight)
            mono, now = time.monotonic(), datetime.now(UTC)
            ended = flight.answered(result, self._failover, mono=mono, now=now)
        if isinstance(ended, Failure):
            return ended
        self._cache.succeed(flight.key, ended, sent=flight.sent)
        return ended.token

    def _landed(self, flight: Flight, task: asyncio.Task[Token | Failure]) -> None:
        """Take the end of a request, before anybody who waits for it does."""
        ended = _CLOSED if task.cancelled() else task.result()
        if isinstance(ended, Failure):
            self._cache.fail(flight.key, ended, mono=time.monotonic(), now=datetime.now(UTC))
            if flight.background:
                _log.warning("a token could not be refreshed: %s", ended.message)
        del self._flights[flight.key]
        self._schedule()

    async def _call(self, flight: Flight) -> Issued | Miss:
        """Make one call to one broker."""
        target = flight.next_target(mono=time.monotonic(), now=datetime.now(UTC))
        connection = self._connections.take(target, flight.identity)
        stub, timeout = token_pb2_grpc.TokenServiceStub(connection.channel), self._options.attempt_timeout
        failed = False
        try:
            response = await stub.IssueToken(issue_request(flight.key), timeout=timeout.total_seconds())
            return issued(response, flight.key, target, sent_at=flight.sent_at)
        except grpc.aio.AioRpcError as error:
            miss = miss_of(cast("grpc.Call", error), target)  # It has the methods that are used.
            failed = not miss.is_from_broker
            return miss
        except grpc.aio.BaseError as error:  # gRPC itself failed, for instance because a channel was closed under it.
            failed = True
            return Miss(target, grpc.StatusCode.INTERNAL, str(error), None, None)
        finally:
            self._close(self._connections.give_back(connection, failed=failed))

    def _open(self, target: Target, identity: Identity) -> grpc.aio.Channel:
        name = self._options.broker_name
        return secure_aio_channel(target, identity=identity, ca_pem=self._options.ca_pem, server_name=name)

    def _close(self, channels: Iterable[grpc.aio.Channel]) -> None:
        for channel in channels:
            task = self._loop.create_task(channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _refresh(self) -> None:
        """Start what is due, and set the timer for what comes next."""
        mono = time.monotonic()
        for key in self._cache.due(mono=mono):
            self._begin(key, mono, background=True)
        used = self._cache.thumbprints()
        if not used.issuperset(self._identities):
            self._identities = {thumbprint: self._identities[thumbprint] for thumbprint in used}
            self._close(self._connections.keep({*used, self._options.identity.thumbprint}))
        self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        mono = time.monotonic()
        following = self._cache.next_due(mono=mono)
        if following is not None and not self._ended.done() and not self._loop.is_closed():
            self._timer = self._loop.call_later(following - mono, self._refresh)
