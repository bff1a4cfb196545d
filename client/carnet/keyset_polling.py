"""What keeps the key set of a verifier fresh: one thread, or one task, that makes all the fetches.

Both follow `carnet.keysets`, which says when to fetch and what may be said meanwhile. Because one thread makes every
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
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from carnet.errors import InvalidKeySetError, InvalidTokenError, InvalidTokenReason, KeySetUnavailableError
from carnet.keyset_source import AsyncKeySetSource, KeySetSource, read_clocks
from carnet.keysets import KeySetCache, KeySetSnapshot, Verdict

__all__ = ["AsyncKeySetPoller", "KeySetPoller"]

_log = logging.getLogger("carnet.trust")

_LONGEST_SLEEP: Final = 5.0
"""Seconds. A timer stands still while a laptop sleeps; so whoever waits for hours looks at both clocks now and then."""


@dataclass(frozen=True, slots=True)
class _Job:
    kid: str | None
    at_least: int


class _Fetches:
    """The steps of a fetch that do not depend on how waiting is done. Called under the lock, or in the event loop."""

    def __init__(self, cache: KeySetCache, timeout: timedelta) -> None:
        self._cache = cache
        self._timeout = timeout.total_seconds()
        self._job: _Job | None = None
        self._closed = False
        self.pid = os.getpid()
        if cache.fetching:  # Left over from a process before the fork, or from an event loop that is gone.
            cache.fail(read_clocks(), jitter=0.0)

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
        self._job = _Job(kid, self._cache.generation)

    def _next(self) -> _Job | float:
        """Return the fetch to make now, or for how many seconds there is nothing to do."""
        if self._job is None:
            wait = self._cache.due_in(read_clocks()).total_seconds()
            if wait > 0:
                return min(wait, _LONGEST_SLEEP)
            self._begin(None)
        job, self._job = self._job, None
        assert job is not None  # noqa: S101 - for the type checker: _begin made it
        return job

    def _end(self, answer: KeySetSnapshot | Exception) -> None:
        """Take in what came of a fetch."""
        # Jitter spreads verifiers; nobody gains by guessing it.
        now, jitter, before = read_clocks(), random.random(), self._cache.generation  # noqa: S311
        if isinstance(answer, Exception):
            self._cache.fail(now, jitter=jitter, why=str(answer) or type(answer).__name__)
            _log.warning("the key set could not be fetched: %s", answer)
            return
        try:
            self._cache.succeed(answer, now, jitter=jitter)
        except InvalidKeySetError as error:
            _log.warning("a key set was refused, the one at hand stays: %s", error)
            return
        if answer.generation != before:
            _log.info("key set generation %d is loaded: %d keys", answer.generation, len(answer.keys.keys))

    def _too_slow(self) -> KeySetUnavailableError:
        return KeySetUnavailableError(
            f"{self._cache.explain(read_clocks())}; no answer came within {self._timeout:g} s"
        )


class KeySetPoller(_Fetches):
    """Fetches from one daemon thread. For one process: after a fork the child makes its own."""

    def __init__(self, cache: KeySetCache, source: KeySetSource, *, timeout: timedelta) -> None:
        super().__init__(cache, timeout)
        self._source = source
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="carnet-key-set", daemon=True)
        self._thread.start()

    def belongs_here(self) -> bool:
        """Say whether the thread is one of this process."""
        return self.pid == os.getpid()

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
            try:
                answer: KeySetSnapshot | Exception = self._source.fetch(job.kid, at_least=job.at_least)
            # Whatever a source raises must not end this thread: nothing would ever be fetched again.
            except Exception as error:  # noqa: BLE001
                answer = error
            with self._changed:
                self._end(answer)
                self._changed.notify_all()

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

    def __init__(self, cache: KeySetCache, source: AsyncKeySetSource, *, timeout: timedelta) -> None:
        super().__init__(cache, timeout)
        self._source = source
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
                    await self._fetch(step)
                    continue
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(step):
                        await self._wake.wait()
        finally:
            self._tell()
            await self._source.close()

    async def _fetch(self, job: _Job) -> None:
        try:
            answer: KeySetSnapshot | Exception = await self._source.fetch(job.kid, at_least=job.at_least)
        # As in the synchronous twin: whatever a source raises must not end this task. A cancellation does.
        except Exception as error:  # noqa: BLE001
            answer = error
        self._end(answer)
        self._tell()

    def _tell(self) -> None:
        """Wake all who wait; whoever waits from now on waits for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()
