"""What asks for the keys and revocations of a verifier: one thread, or one task, that makes all the fetches.

Both follow `carnet.keysets`, which says when to fetch and what may be said meanwhile: all the time where a verifier
polls, and only for a missing key while a stream brings the news (`carnet.watching`). Because one thread makes every
fetch, there is never more than one under way, and no caller of `verify` is ever inside gRPC: it waits for a result, for
a bounded time, or does not wait at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from carnet.errors import InvalidKeySetError, InvalidTokenError, InvalidTokenReason, KeySetUnavailableError
from carnet.forking import Gate
from carnet.keyset_source import (
    AsyncKeySetSource,
    AsyncRevocationSource,
    KeySetSource,
    Polled,
    RevocationSource,
)
from carnet.keysets import KeySetSnapshot, Supply, Verdict
from carnet.revocations import Position
from carnet.trust_messages import RefusedResponseError
from carnet.trust_servers import read_clocks
from carnet.trust_state import TrustState

__all__ = ["AsyncKeySetPoller", "KeySetPoller"]

_log = logging.getLogger("carnet.trust")

_LONGEST_SLEEP: Final = 5.0
"""Seconds. A timer stands still while a laptop sleeps; so whoever waits for hours looks at both clocks now and then."""


Afterwards = Callable[[], object]


def _nothing() -> Afterwards:
    return _nothing


@dataclass(frozen=True, slots=True)
class _Job:
    kid: str | None
    at_least: int
    since: Position | None
    """What is known of revocations, where these are asked for too."""


@dataclass(frozen=True, slots=True)
class _Fetched:
    """What came of a fetch: the key set, or what it failed of; and the same of revocations, if these were asked for."""

    keys: KeySetSnapshot | Exception
    revocations: Polled | Exception | None = None
    asked_for_revocations: bool = False


class _Fetches:
    """The steps of a fetch that do not depend on how waiting is done. Called under the lock, or in the event loop."""

    def __init__(self, state: TrustState, timeout: timedelta, *, tells_revocations: bool, awaits_push: bool) -> None:
        self.state = state
        self._cache = state.keys
        self._timeout = timeout.total_seconds()
        self._tells_revocations = tells_revocations
        self._told_of_old_brokers = False
        self._job: _Job | None = None
        self._closed = False
        self.pid = os.getpid()
        self._cache.supply = Supply.AWAIT if awaits_push else Supply.POLL
        if self._cache.fetching:  # Left over from a process before the fork, or from an event loop that is gone.
            self._cache.fail(read_clocks(), jitter=0.0)

    def _decided(self, kid: str) -> bool:
        """Say whether the set holds `kid`; if not, a fetch that may tell is under way. Raises where none may be."""
        if self._closed:
            msg = "the verifier is closed"
            raise KeySetUnavailableError(msg)
        now = read_clocks()
        match self._cache.verdict(kid, now):
            case Verdict.USE:
                return True
            case Verdict.NO:
                msg = f"the issuer does not publish the key {kid}"
                raise InvalidTokenError(InvalidTokenReason.UNKNOWN_KEY, msg)
            case Verdict.CANNOT_TELL:
                raise KeySetUnavailableError(self._cache.explain(now))
            case Verdict.ASK:
                self._begin(kid if self._cache.usable(now) is not None else None)
        return False

    def _begin(self, kid: str | None) -> None:
        self._cache.begin(read_clocks(), kid=kid)
        self._job = _Job(kid, self._cache.generation, None if self.state.wants_all else self.state.position)

    def _wants_revocations(self, job: _Job) -> bool:
        return self._tells_revocations and job.kid is None

    def _next(self) -> _Job | float:
        """Return the fetch to make now, or for how many seconds there is nothing to do."""
        if self._job is None:
            if self._cache.supply is not Supply.POLL:
                return _LONGEST_SLEEP
            wait = self._cache.due_in(read_clocks()).total_seconds()
            if wait > 0:
                return min(wait, _LONGEST_SLEEP)
            self._begin(None)
        job, self._job = self._job, None
        assert job is not None  # noqa: S101 - for the type checker: _begin made it
        return job

    def _end(self, fetched: _Fetched) -> None:
        """Take in what came of a fetch."""
        # Jitter spreads verifiers; nobody gains by guessing it.
        now, jitter, before = read_clocks(), random.random(), self._cache.generation  # noqa: S311
        answer = fetched.keys
        if isinstance(answer, Exception):
            self._cache.fail(now, jitter=jitter, why=str(answer) or type(answer).__name__)
            _log.warning("the key set could not be fetched: %s", answer)
            return
        missing = self._take_revocations(fetched) if fetched.asked_for_revocations else ""
        try:
            self._cache.succeed(answer, now, jitter=jitter, incomplete=missing)
        except InvalidKeySetError as error:
            _log.warning("a key set was refused, the one at hand stays: %s", error)
            return
        if answer.generation != before:
            _log.info("key set generation %d is loaded: %d keys", answer.generation, len(answer.keys.keys))

    def _take_revocations(self, fetched: _Fetched) -> str:
        """Load what was told of revocations; return what is missing, empty where nothing is."""
        polled = fetched.revocations
        if polled is None:
            if self.state.position is not None:
                return "the brokers that answer are of a version that does not tell of revocations"
            self._cache.follows_revocations = False
            if not self._told_of_old_brokers:
                self._told_of_old_brokers = True
                _log.warning("the brokers are of a version that does not tell of revocations: none is looked at")
            return ""
        if isinstance(polled, Polled):
            try:
                self.state.apply(polled.response, asked_at=polled.asked_at, now=read_clocks(), of_keys=False)
            except RefusedResponseError as error:
                _log.warning("revocations were refused, those at hand stay: %s", error)
                return str(error)
            return ""
        _log.warning("the revocations could not be fetched: %s", polled)
        return str(polled) or type(polled).__name__

    def _too_slow(self) -> KeySetUnavailableError:
        return KeySetUnavailableError(
            f"{self._cache.explain(read_clocks())}; no answer came within {self._timeout:g} s"
        )


class KeySetPoller(_Fetches):
    """Fetches from one daemon thread. For one process: after a fork the child makes its own."""

    def __init__(
        self,
        state: TrustState,
        source: KeySetSource,
        *,
        timeout: timedelta,
        revocations: RevocationSource | None = None,
        changed: Callable[[], Afterwards] = _nothing,
        awaits_push: bool = False,
    ) -> None:
        """Start. `changed` is called after each change, under the lock; what it returns is called without."""
        super().__init__(state, timeout, tells_revocations=revocations is not None, awaits_push=awaits_push)
        self._source = source
        self._revocations = revocations
        self._on_change = changed
        self._gate = Gate()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="carnet-key-set", daemon=True)
        self._thread.start()

    def belongs_here(self) -> bool:
        """Say whether the thread is one of this process."""
        return self.pid == os.getpid()

    @contextlib.contextmanager
    def changing(self) -> Iterator[TrustState]:
        """Hold the lock while the state is changed, then wake all who wait for a change."""
        with self._changed:
            yield self.state
            self._changed.notify_all()
            afterwards = self._on_change()
        afterwards()

    def obtain(self, kid: str) -> None:
        """Return once the key set holds `kid`. Blocks for at most one time limit, and only for an unknown key.

        Raises `InvalidTokenError` (UNKNOWN_KEY) or `KeySetUnavailableError`.
        """
        end = time.monotonic() + self._timeout
        with self._changed:
            while not self._decided(kid):
                self._changed.notify_all()
                left = end - time.monotonic()
                if left <= 0:
                    raise self._too_slow()
                self._changed.wait(left)

    def wait_usable(self, timeout: timedelta) -> None:
        """Return once there is a key set that may decide. Raises `KeySetUnavailableError` when the time is over."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._cache.usable(read_clocks()) is not None, timeout.total_seconds()
            )
            now = read_clocks()
            if self._cache.usable(now) is None:
                raise KeySetUnavailableError(self._cache.explain(now))

    def stop(self) -> None:
        """End the thread and close the source, without waiting for either. May be called from anywhere, and twice."""
        if not self.belongs_here():  # At the exit of a child. The lock may be held by a thread that it does not have.
            return
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._source.close()

    def join(self) -> None:
        """Wait for the thread, after `stop`."""
        self._thread.join(self._timeout)

    def _run(self) -> None:
        while (job := self._wait_for_job()) is not None:
            fetched = self._gate.run(self._fetch, job)
            with self.changing():
                self._end(fetched)

    def _fetch(self, job: _Job) -> _Fetched:
        try:
            keys = self._source.fetch(job.kid, at_least=job.at_least)
        # Whatever a source raises must not end this thread: nothing would ever be fetched again.
        except Exception as error:  # noqa: BLE001
            return _Fetched(error)
        if self._revocations is None or not self._wants_revocations(job):
            return _Fetched(keys)
        try:
            told: Polled | Exception | None = self._revocations.fetch_revocations(job.since)
        except Exception as error:  # noqa: BLE001 - as above
            told = error
        return _Fetched(keys, told, asked_for_revocations=True)

    def _wait_for_job(self) -> _Job | None:
        with self._changed:
            while not self._closed:
                step = self._next()
                if isinstance(step, _Job):
                    return step
                self._changed.wait(step)
        return None


class AsyncKeySetPoller(_Fetches):
    """Fetches from one task of the running event loop."""

    def __init__(
        self,
        state: TrustState,
        source: AsyncKeySetSource,
        *,
        timeout: timedelta,
        revocations: AsyncRevocationSource | None = None,
        changed: Callable[[], Afterwards] = _nothing,
        awaits_push: bool = False,
    ) -> None:
        """Do what `KeySetPoller` does; `changed` is called in the event loop."""
        super().__init__(state, timeout, tells_revocations=revocations is not None, awaits_push=awaits_push)
        self._source = source
        self._revocations = revocations
        self._on_change = changed
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name="carnet-key-set")

    def belongs_here(self) -> bool:
        """Say whether the task is one of the running event loop."""
        return self.pid == os.getpid() and self._loop is asyncio.get_running_loop()

    def runs_elsewhere(self) -> bool:
        """Say whether the task is one of another event loop of this process that is still open."""
        return self.pid == os.getpid() and not self._loop.is_closed() and not self.belongs_here()

    @contextlib.contextmanager
    def changing(self) -> Iterator[TrustState]:
        """Do what `KeySetPoller.changing` does. There is no lock: nothing in it may wait."""
        yield self.state
        self._wake.set()
        self._tell()

    async def obtain(self, kid: str) -> None:
        """Do what `KeySetPoller.obtain` does."""
        try:
            async with asyncio.timeout(self._timeout):
                while not self._decided(kid):
                    self._wake.set()
                    await self._changed.wait()
        except TimeoutError:
            raise self._too_slow() from None

    async def wait_usable(self, timeout: timedelta) -> None:  # noqa: ASYNC109 - as in the synchronous twin
        """Do what `KeySetPoller.wait_usable` does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout.total_seconds()):
                while not self._closed and self._cache.usable(read_clocks()) is None:
                    await self._changed.wait()
        now = read_clocks()
        if self._cache.usable(now) is None:
            raise KeySetUnavailableError(self._cache.explain(now))

    def stop(self) -> None:
        """End the task, which closes the source. May be called from any thread, and twice."""
        if self.pid != os.getpid():
            return
        self._closed = True
        with contextlib.suppress(RuntimeError):  # The event loop is closed, and its tasks are gone with it.
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def join(self) -> None:
        """Wait for the task, after `stop`."""
        await asyncio.wait([self._task], timeout=self._timeout)

    async def _run(self) -> None:
        try:
            while True:
                step = self._next()
                if isinstance(step, _Job):
                    self._end(await self._fetch(step))
                    self._tell()
                    continue
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(step):
                        await self._wake.wait()
        finally:
            self._tell()
            await self._source.close()

    async def _fetch(self, job: _Job) -> _Fetched:
        try:
            keys = await self._source.fetch(job.kid, at_least=job.at_least)
        # As in the synchronous twin: whatever a source raises must not end this task. A cancellation does.
        except Exception as error:  # noqa: BLE001
            return _Fetched(error)
        if self._revocations is None or not self._wants_revocations(job):
            return _Fetched(keys)
        try:
            told: Polled | Exception | None = await self._revocations.fetch_revocations(job.since)
        except Exception as error:  # noqa: BLE001 - as above
            told = error
        return _Fetched(keys, told, asked_for_revocations=True)

    def _tell(self) -> None:
        """Wake all who wait; whoever waits from now on waits for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._on_change()()
