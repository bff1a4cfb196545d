"""What keeps a trust stream open: one thread, or one task, that follows one of the trust servers.

Both run `carnet.watch_protocol.WatchProtocol` over ``TrustService.Watch``, and follow these rules:

- The server that answered last is asked again, others after it; one that failed is asked last until its pause is over.
- A server that says nothing for two heartbeats is left. So is one that lags behind what is loaded here, or says what
  cannot be.
- Between two attempts passes a random time, up to a limit that doubles with each round of failures.
- From the first attempt that failed until a stream brings news again, the poller beside asks for keys and revocations
  (`carnet.keyset_polling`). So a broker of an older version, one whose policy does not let this workload watch, or one
  that has too many streams, is as good as it can be.
- At the end a Goodbye is sent, so that no rotation waits for a verifier that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import random
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

from carnet.endpoints import Failover, Target
from carnet.forking import Gate
from carnet.keyset_polling import AsyncKeySetPoller, KeySetPoller
from carnet.keysets import Supply
from carnet.trust_messages import RefusedResponseError
from carnet.trust_servers import (
    AsyncTrustChannels,
    TrustChannels,
    TrustServers,
    code_of,
    describe,
    read_clocks,
    remedy,
)
from carnet.trust_state import Outcome, VerifierStatus
from carnet.trust_wire import request_message, watch_response
from carnet.v1.trust_pb2 import WatchRequest, WatchResponse
from carnet.v1.trust_pb2_grpc import TrustServiceStub
from carnet.watch_protocol import WatchProtocol

__all__ = ["AsyncWatcher", "Choices", "Watcher"]

_log: Final = logging.getLogger("carnet.trust")

_FIRST_ANSWER: Final = 5.0
"""Seconds within which a server must answer the Hello: a handshake is in them, and a snapshot's first part."""
_GOODBYE: Final = 1.0
"""Seconds for the server to take leave."""
_FIRST_WAIT: Final = 0.5
_LONGEST_WAIT: Final = 15.0
_REFUSED_WAIT: Final = 60.0
"""After a server that will not let this verifier watch: a policy changes now and then, a version is rolled out."""
_LIVED: Final = 5.0
"""Seconds after which a stream counts as one that worked: then a new one is opened with no more delay than jitter."""
_SAY_AGAIN: Final = 60.0
"""Seconds after which the same failure is said again."""
_DOUBLINGS: Final = 8
_SILENT: Final = "it said nothing for too long"

_Call: TypeAlias = "grpc.aio.StreamStreamCall[WatchRequest, WatchResponse]"


@dataclass(slots=True)
class Choices:
    """What a verifier may choose while its stream is open."""

    accepts_stale: bool
    """Whether some calls are verified with knowledge that is too old: then no rotation waits for this verifier."""


class _Watching:
    """What both watchers share: whom to follow, when to try again, and what to do with a message."""

    def __init__(
        self,
        poller: KeySetPoller | AsyncKeySetPoller,
        servers: TrustServers,
        *,
        audience: str,
        choices: Choices,
    ) -> None:
        self._poller = poller
        self._servers = servers
        self._audience = audience
        self._choices = choices
        self._instance_id = secrets.token_urlsafe(16)  # Of this process: a child after a fork makes its own.
        self._failover = Failover(servers.targets, first=random.randrange(len(servers.targets)))  # noqa: S311
        self._failures = 0
        self._began = 0.0
        self._said: tuple[str, float] = ("", 0.0)
        self._heard = False
        self._protocol: WatchProtocol | None = None
        self._target: Target | None = None
        self._last_error = ""

    def status(self) -> VerifierStatus:
        """Return how the verifier is doing."""
        protocol, target = self._protocol, self._target
        return self._poller.state.status(
            read_clocks(),
            target=None if target is None or not self._heard else str(target),
            live=protocol is not None and protocol.live,
            last_error=self._last_error,
        )

    def _begin(self) -> tuple[Target, WatchProtocol]:
        self._target = self._failover.order(time.monotonic())[0]
        self._heard = False
        self._began = time.monotonic()
        self._protocol = WatchProtocol(
            self._poller.state,
            instance_id=self._instance_id,
            audience=self._audience,
            accepts_stale=self._choices.accepts_stale,
        )
        return self._target, self._protocol

    def _says_otherwise(self, protocol: WatchProtocol) -> bool:
        """Say whether a Hello would be another one by now."""
        return protocol.accepts_stale != self._choices.accepts_stale

    def _take(self, target: Target, protocol: WatchProtocol, message: WatchResponse) -> WatchRequest:
        """Load a message and return the answer to it. Raises `RefusedResponseError`."""
        response = watch_response(message)  # Before the lock: a large one takes a while.
        with self._poller.changing() as state:
            epochs = state.new_epochs
            outcome = protocol.receive(response, read_clocks())
            answer = protocol.answer(read_clocks())
        if state.new_epochs != epochs:
            _log.warning(
                "%s is in a new epoch (%d): its store was restored. Its revocations are loaded, and those known before"
                " stay; check that none was lost",
                target,
                response.position.epoch,
            )
        if not self._heard:
            self._heard = True
            self._last_error = ""
            self._failover.succeeded(target)
            _log.info("the trust stream to %s is open", target)
        if outcome is Outcome.LOADED:
            told = response.position
            _log.info(
                "%s told of generation %d and revocation %d (epoch %d)",
                target,
                told.generation,
                told.revocation_version,
                told.epoch,
            )
        return request_message(answer)

    def _ended(self, target: Target, error: Exception | None, why: str = "") -> float:
        """Note that a stream is over, and why; return for how many seconds to wait before the next one."""
        heard, self._heard = self._heard, False
        self._target = None
        text = why or (str(error) if isinstance(error, RefusedResponseError) else describe(error))
        hint = remedy(text, self._servers)
        code = code_of(error)
        self._last_error = f"{target}: {text}"
        if not isinstance(error, RefusedResponseError) or not error.gap:
            self._failover.failed(target, time.monotonic())
        if heard and time.monotonic() - self._began >= _LIVED:
            self._failures = 0
        self._failures += 1
        with self._poller.changing() as state:
            state.keys.lost(f"{self._last_error}; {hint}")
            if not heard or isinstance(error, RefusedResponseError):
                state.keys.supply = Supply.POLL
        if heard and not isinstance(error, RefusedResponseError):
            # As a stream ends: its server restarts, or the connection is as old as one may get.
            self._say(logging.INFO, f"the trust stream to {target} ended ({text})")
        else:
            if code is grpc.StatusCode.UNIMPLEMENTED:
                hint = "its version knows no stream"
            self._say(logging.WARNING, f"no trust stream to {target} ({text}), asking instead: {hint}")
        rounds = min((self._failures - 1) // len(self._servers.targets), _DOUBLINGS)
        will_not = code in {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED}
        longest = _REFUSED_WAIT if will_not and rounds else min(_LONGEST_WAIT, _FIRST_WAIT * 2.0**rounds)
        return random.random() * longest  # noqa: S311 - spreads verifiers

    def _say(self, level: int, text: str) -> None:
        said, at = self._said
        now = time.monotonic()
        if text != said or now - at >= _SAY_AGAIN:
            self._said = text, now
            _log.log(level, "%s", text)


class _Requests(Iterator[WatchRequest]):
    """What is said on one stream, as gRPC takes it: in a thread of its own, which also watches the time."""

    def __init__(self, hello: WatchRequest) -> None:
        self._queue: queue.SimpleQueue[WatchRequest | None] = queue.SimpleQueue()
        self._queue.put(hello)
        self._deadline = time.monotonic() + _FIRST_ANSWER
        self.call: grpc.Call | None = None
        self.timed_out = False

    def say(self, request: WatchRequest, *, patience: float) -> None:
        """Send `request`, and expect the next message within `patience` seconds."""
        self._deadline = time.monotonic() + patience
        self._queue.put(request)

    def finish(self) -> None:
        """Say no more."""
        self._queue.put(None)

    def __next__(self) -> WatchRequest:
        while True:
            try:
                request = self._queue.get(timeout=max(0.0, self._deadline - time.monotonic()))
            except queue.Empty:
                if time.monotonic() < self._deadline:
                    continue
                self.timed_out = True
                if self.call is not None:
                    self.call.cancel()
                raise StopIteration from None
            if request is None:
                raise StopIteration
            return request


class Watcher(_Watching):
    """Follows from one daemon thread. For one process: after a fork the child makes its own."""

    def __init__(
        self,
        poller: KeySetPoller,
        servers: TrustServers,
        channels: TrustChannels,
        *,
        audience: str,
        choices: Choices,
    ) -> None:
        super().__init__(poller, servers, audience=audience, choices=choices)
        self._stop_poller = poller.stop
        self._channels = channels
        self._lock = threading.Lock()
        self._requests: _Requests | None = None
        self._gate = Gate(self.renew)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="carnet-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take leave, end the thread, then stop the poller, without waiting. May be called from anywhere, and twice."""
        if not self._poller.belongs_here():
            return
        with self._lock:
            if self._stopped.is_set():
                return
            self._stopped.set()
            self._take_leave()

    def renew(self) -> None:
        """Open the stream anew: what the Hello says has changed."""
        with self._lock:
            requests = self._requests
        if requests is not None and requests.call is not None:
            requests.call.cancel()

    def join(self) -> None:
        """Wait for the thread, after `stop`."""
        self._thread.join(2 * _GOODBYE)

    def _take_leave(self) -> None:
        if self._requests is not None and self._protocol is not None:
            self._requests.say(request_message(self._protocol.goodbye()), patience=_GOODBYE)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._stopped.wait(self._gate.run(self._watch))
        finally:
            self._stop_poller()

    def _watch(self) -> float:
        target, protocol = self._begin()
        requests = _Requests(request_message(protocol.hello(read_clocks())))
        error: Exception | None = None
        try:
            stub = TrustServiceStub(self._channels.get(target))
            call = stub.Watch(requests)
            requests.call = call
            with self._lock:
                self._requests = requests
                if self._stopped.is_set():
                    self._take_leave()
            if self._gate.closing or self._says_otherwise(protocol):  # Since then, and `renew` found no stream.
                call.cancel()
            for message in call:
                if self._stopped.is_set():
                    continue
                answer = self._take(target, protocol, message)
                with self._lock:
                    if not self._stopped.is_set():
                        requests.say(answer, patience=protocol.patience.total_seconds())
        except (grpc.RpcError, RefusedResponseError, ValueError) as problem:  # ValueError: the channel was closed.
            error = problem
        # Whatever else is wrong with a message must not end this thread: nothing would ever be learnt again.
        except Exception as problem:  # noqa: BLE001 - see above
            _log.exception("a message of %s could not be read", target)
            error = problem
        finally:
            with self._lock:
                self._requests = None
            requests.finish()
            if requests.call is not None:
                requests.call.cancel()
        if self._stopped.is_set() or self._gate.closing or self._says_otherwise(protocol):
            return 0.0
        return self._ended(target, error, _SILENT if requests.timed_out else "")


class AsyncWatcher(_Watching):
    """Follows from one task of the running event loop."""

    def __init__(
        self,
        poller: AsyncKeySetPoller,
        servers: TrustServers,
        channels: AsyncTrustChannels,
        *,
        audience: str,
        choices: Choices,
    ) -> None:
        super().__init__(poller, servers, audience=audience, choices=choices)
        self._stop_poller = poller.stop
        self._pid = poller.pid
        self._channels = channels
        self._stopped = False
        self._interrupted = asyncio.Event()  # By `stop`, or by `renew`.
        self._reading: asyncio.Future[Any] | None = None
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name="carnet-watch")

    def stop(self) -> None:
        """Take leave, end the task, then stop the poller. May be called from any thread, and twice."""
        if self._pid != os.getpid():
            return
        self._stopped = True
        with contextlib.suppress(RuntimeError):  # The event loop is closed, and its tasks are gone with it.
            self._loop.call_soon_threadsafe(self._interrupted.set)

    def renew(self) -> None:
        """Open the stream anew: what the Hello says has changed."""
        self._interrupted.set()

    async def join(self) -> None:
        """Wait for the task, after `stop`."""
        await asyncio.wait([self._task], timeout=2 * _GOODBYE)

    async def _run(self) -> None:
        try:
            while not self._stopped:
                wait = await self._watch()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._interrupted.wait()
        finally:
            self._stop_poller()

    async def _watch(self) -> float:
        if not self._stopped:
            self._interrupted.clear()
        target, protocol = self._begin()
        error: Exception | None = None
        why = ""
        call: _Call = TrustServiceStub(self._channels.get(target)).Watch()
        try:
            await _write(call, request_message(protocol.hello(read_clocks())), patience := _FIRST_ANSWER)
            while (message := await self._next(call, patience)) is not None:
                answer = self._take(target, protocol, message)
                patience = protocol.patience.total_seconds()
                await asyncio.sleep(0)  # First those who were waiting for the news, then the broker.
                await _write(call, answer, patience)
            if self._stopped:
                await self._take_leave(call, protocol)
        except (grpc.RpcError, grpc.aio.UsageError, RefusedResponseError) as problem:
            error = problem
        except asyncio.InvalidStateError:  # The call ended between two messages.
            error = grpc.aio.AioRpcError(
                await call.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), details=await call.details()
            )
        except TimeoutError:
            why = _SILENT
        # As in the synchronous twin.
        except Exception as problem:  # noqa: BLE001 - see above
            _log.exception("a message of %s could not be read", target)
            error = problem
        finally:
            call.cancel()
            await self._forget_reading()
        if self._stopped or self._says_otherwise(protocol):
            return 0.0
        return self._ended(target, error, why)

    async def _next(self, call: _Call, patience: float) -> WatchResponse | None:
        """Return the next message, None where there will be none, or none is wanted. Raises `TimeoutError`."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(call.read())
        interrupted = asyncio.ensure_future(self._interrupted.wait())
        try:
            await asyncio.wait({self._reading, interrupted}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            interrupted.cancel()
        if self._interrupted.is_set():
            return None
        if not self._reading.done():
            raise TimeoutError
        reading, self._reading = self._reading, None
        message = reading.result()
        return message if isinstance(message, WatchResponse) else None

    async def _take_leave(self, call: _Call, protocol: WatchProtocol) -> None:
        await _write(call, request_message(protocol.goodbye()), _GOODBYE)
        end = self._loop.time() + _GOODBYE
        while (left := end - self._loop.time()) > 0:  # What still comes is not looked at.
            if self._reading is None:
                self._reading = asyncio.ensure_future(call.read())
            await asyncio.wait({self._reading}, timeout=left)
            if not self._reading.done() or not isinstance(self._reading.result(), WatchResponse):
                return
            self._reading = None

    async def _forget_reading(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.wait({reading})
            if not reading.cancelled():
                reading.exception()  # Looked at, so that nothing complains that nobody did.


async def _write(call: _Call, request: WatchRequest, patience: float) -> None:
    async with asyncio.timeout(patience):
        await call.write(request)
