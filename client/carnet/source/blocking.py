"""`Client`: tokens for code that blocks.

Requests go out as gRPC futures, so no thread waits for the network on behalf of another: a caller waits for the shared
request as long as *its* timeout says, and the request goes on for the others. One daemon thread for each client does
nothing but start refreshes when they are due; it ends when nothing is left to refresh.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import grpc

from carnet.cache import CacheSettings, Failure, Fetch, Held, Issued, Join, Ready, TokenCache, TokenKey
from carnet.endpoints import Target
from carnet.identity import Identity, StrPath
from carnet.source.connections import Connection, Connections
from carnet.source.flight import Flight
from carnet.source.options import ClientOptions, check_key, new_rng, token_key
from carnet.source.wire import Miss, issue_request, issued, miss_of
from carnet.tls import secure_channel
from carnet.token import Token
from carnet.v1 import token_pb2_grpc

__all__ = ["Client"]

_log: Final = logging.getLogger("carnet")
_CLOSED: Final = Failure("the client was closed")

_Outcome: TypeAlias = Future[Token | Failure]
"""What those who wait for a request wait for."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One call to one broker."""

    flight: Flight
    outcome: _Outcome
    connection: Connection[grpc.Channel]


class Client:
    """A source of tokens for one workload. Thread-safe; make one for each process and keep it.

    What is not given comes from the environment: `brokers` (one text divided by commas, or a list) from
    ``CARNET_BROKER``, `broker_name` (the DNS name in the broker's certificate) from ``CARNET_BROKER_NAME``, `cert_file`
    and `key_file` from ``CARNET_CERT_FILE`` and ``CARNET_KEY_FILE`` unless `identity` is given, `ca_file` from
    ``CARNET_CA_FILE``. `timeout` is the longest that `get_token` waits, `attempt_timeout` how long one broker may take
    before the next is asked. Raises `ConfigError`. Nothing is connected before the first token is asked for.

    A client may be made before a fork: each process then has its own connections, thread and requests, and starts with
    the tokens that were there.
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
        self._engines = {os.getpid(): _Engine(self._options, self._options.new_cache())}
        self._closed = False

    @property
    def identity(self) -> Identity:
        """The certificate and key that tokens are asked for with, unless a call names others."""
        return self._options.identity

    @property
    def ca_pem(self) -> bytes:
        """The authorities that the broker is checked by."""
        return self._options.ca_pem

    def get_token(
        self,
        audience: str,
        *,
        scopes: Iterable[str] = (),
        ttl: timedelta | None = None,
        identity: Identity | None = None,
        timeout: timedelta | None = None,
    ) -> Token:
        """Return a valid token for `audience`.

        One that is cached and valid is returned at once, always, whatever the state of the broker; it is replaced in
        the background before it ends. Otherwise this waits for the broker, at most `timeout` (the client's by default),
        and shares one request with all who ask for the same.

        No `scopes` asks for all that the grant gives. `ttl` is the life that is wanted; the broker may shorten it.
        `identity` asks as another certificate of this workload.

        Raises `RequestDeniedError` where the broker refused, `BrokerUnavailableError` where none answered in time or
        the client is closed, `ConfigError` for a request that cannot be granted by anybody.
        """
        wait = self._options.timeout if timeout is None else timeout
        identity = identity or self._options.identity
        return self._engine().get(token_key(identity, audience, scopes, ttl), identity, wait)

    def close(self) -> None:
        """End requests, connections and the background thread. Callers that wait get `BrokerUnavailableError`."""
        self._closed = True
        engine = self._engines.get(os.getpid())
        if engine is not None:
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        brokers = ",".join(map(str, self._options.brokers))
        return f"<Client {self._options.identity.spiffe_id} brokers={brokers}>"

    def _engine(self) -> _Engine:
        if self._closed:
            raise _CLOSED.error()
        pid = os.getpid()
        engine = self._engines.get(pid)
        if engine is None:
            # In the child of a fork. The parent's locks may be held for ever, and its gRPC objects may not be touched,
            # not even to free them: its engine stays where it is. setdefault: two threads may get here at once.
            *_, parent = self._engines.values()
            engine = self._engines.setdefault(pid, parent.for_child())
        return engine


class _Engine:
    """All of a client that must not cross a fork. One lock; nothing that waits or calls back is done under it."""

    def __init__(self, options: ClientOptions, cache: TokenCache) -> None:
        self._options = options
        self._cache = cache
        self._failover = options.new_failover()
        self._connections = Connections(self._open)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._flights: dict[TokenKey, tuple[Flight, _Outcome]] = {}
        self._identities: dict[str, Identity] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def for_child(self) -> _Engine:
        """Return an engine for the child of a fork, with the tokens of this one."""
        engine = _Engine(self._options, self._cache.copy_idle(new_rng()))
        engine._identities.update(self._identities)
        return engine

    def get(self, key: TokenKey, identity: Identity, timeout: timedelta) -> Token:
        """Return a token for `key`, waiting at most `timeout`."""
        mono, now = time.monotonic(), datetime.now(UTC)
        with self._lock:
            token = self._cache.fresh(key, mono=mono, now=now)
        if token is not None:
            return token
        deadline = mono + timeout.total_seconds()
        while True:
            got = self._ask(key, identity, deadline)
            if got is None:
                continue
            if isinstance(got, Token):
                return got
            flight, outcome = got
            try:
                ended = outcome.result(max(deadline - time.monotonic(), 0.0))
            except TimeoutError:
                raise flight.late(timeout, datetime.now(UTC)).error() from None
            if isinstance(ended, Token):
                return ended
            if ended.reason is not None or time.monotonic() >= deadline:
                raise ended.error()

    def close(self) -> None:
        """End everything, and wait for the thread."""
        with self._lock:
            self._closed = True
            thread = self._thread
            outcomes = [outcome for _, outcome in self._flights.values()]
            self._flights.clear()
            channels = self._connections.keep(())
            self._changed.notify_all()
        for outcome in outcomes:
            outcome.set_result(_CLOSED)
        _close(channels)
        if thread is not None:
            thread.join()

    def _ask(self, key: TokenKey, identity: Identity, deadline: float) -> Token | tuple[Flight, _Outcome] | None:
        """Return the token, or the request to wait for; None after a pause: ask again."""
        mono = time.monotonic()
        with self._lock:
            if self._closed:
                raise _CLOSED.error()
            match self._cache.ask(key, mono=mono, now=datetime.now(UTC)):
                case Ready(token, due):
                    if due:
                        self._wake()
                    return token
                case Held(failure, until):
                    if failure.reason is not None or until > deadline:
                        raise failure.error()
                    self._changed.wait(until - mono)
                    return None
                case Join():
                    return self._flights[key]
                case Fetch():
                    check_key(key)
                    self._identities[key.thumbprint] = identity
                    flight, outcome = self._begin(key, mono, background=False)
        self._send(flight, outcome)
        return flight, outcome

    def _begin(self, key: TokenKey, mono: float, *, background: bool) -> tuple[Flight, _Outcome]:
        """Start the request for `key`, which the cache allows; `_send` must follow, without the lock."""
        self._cache.begin(key, mono=mono)
        identity, targets = self._identities[key.thumbprint], self._failover.order(mono)
        flight = Flight(key, identity, self._options.broker_name, targets, background)
        self._flights[key] = flight, Future()
        return self._flights[key]

    def _send(self, flight: Flight, outcome: _Outcome) -> None:
        """Send the request to the next broker; when that answers, `_answered` goes on."""
        with self._lock:
            if self._closed:
                return
            target = flight.next_target(mono=time.monotonic(), now=datetime.now(UTC))
            connection = self._connections.take(target, flight.identity)
        stub, timeout = token_pb2_grpc.TokenServiceStub(connection.channel), self._options.attempt_timeout
        try:
            call = stub.IssueToken.future(issue_request(flight.key), timeout=timeout.total_seconds())
        except ValueError:  # The channel is closed: `close` was faster, and has told those who wait.
            return
        call.add_done_callback(partial(self._answered, _Attempt(flight, outcome, connection)))

    def _answered(self, attempt: _Attempt, call: Any) -> None:  # noqa: ANN401 - a call and a future; gRPC has no type
        """Take the end of one call. Runs in gRPC's thread, or in that of `_send`."""
        flight, target = attempt.flight, attempt.connection.target
        if call.code() is grpc.StatusCode.OK:
            result = issued(call.result(), flight.key, target, sent_at=flight.sent_at)
        else:
            result = miss_of(call, target)
        with self._lock:
            failed = isinstance(result, Miss) and not result.is_from_broker
            channels = self._connections.give_back(attempt.connection, failed=failed)
            closed = self._closed
            ended = None if closed else self._settle(flight, result)
        _close(channels)
        if closed:
            return
        match ended:
            case None:
                self._send(flight, attempt.outcome)
            case Issued(token):
                attempt.outcome.set_result(token)
            case Failure(message):
                if flight.background:
                    _log.warning("a token could not be refreshed: %s", message)
                attempt.outcome.set_result(ended)

    def _settle(self, flight: Flight, result: Issued | Miss) -> Issued | Failure | None:
        """Tell the cache if the request has ended with `result`; None where the next broker is to be asked."""
        mono, now = time.monotonic(), datetime.now(UTC)
        ended = flight.answered(result, self._failover, mono=mono, now=now)
        if ended is None:
            return None
        if isinstance(ended, Issued):
            self._cache.succeed(flight.key, ended, sent=flight.sent)
        else:
            self._cache.fail(flight.key, ended, mono=mono, now=now)
        del self._flights[flight.key]
        self._wake()
        return ended

    def _open(self, target: Target, identity: Identity) -> grpc.Channel:
        name = self._options.broker_name
        return secure_channel(target, identity=identity, ca_pem=self._options.ca_pem, server_name=name)

    def _wake(self) -> None:
        """Tell those who wait under the lock that something changed; see that the thread is there."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._refresh, name="carnet-refresh", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _refresh(self) -> None:
        """Start what is due, until nothing is left to refresh. Runs in the thread."""
        while True:
            with self._lock:
                if self._closed:
                    return
                mono = time.monotonic()
                flights = [self._begin(key, mono, background=True) for key in self._cache.due(mono=mono)]
                channels = self._forget()
                following = self._cache.next_due(mono=mono)
                if following is None and not self._flights:
                    self._thread = None
                elif not flights and not channels:
                    self._changed.wait(None if following is None else following - mono)
                ends = self._thread is None
            _close(channels)
            for flight, outcome in flights:
                self._send(flight, outcome)
            if ends:
                return

    def _forget(self) -> list[grpc.Channel]:
        """Let go of identities that have no token any more. Return the channels to close."""
        used = self._cache.thumbprints()
        if used.issuperset(self._identities):
            return []
        self._identities = {thumbprint: self._identities[thumbprint] for thumbprint in used}
        return self._connections.keep({*used, self._options.identity.thumbprint})


def _close(channels: Iterable[grpc.Channel]) -> None:
    for channel in channels:
        channel.close()
