"""Group commit: many calls wait for one write to the disk.

While one write is under way, the records of all calls that come in collect, and go out together with the next one. So a
quiet broker answers after one write, and a busy one makes no more writes than the disk can take.

A thread that hangs in a sync cannot be called back. Its callers can: each is refused after the deadline, and while a
write is under way for longer than that, new callers are refused at once and nothing collects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from datetime import timedelta
from typing import Final

from carnet_broker.core.ledger import DurableRecord
from carnet_broker.ports import AuditUnavailableError

__all__ = ["GroupCommit"]

_HANGING: Final = "the audit file did not take the record in time: is its disk hanging?"


class GroupCommit:
    """Makes records durable, in groups. Lives on one event loop."""

    def __init__(
        self,
        write: Callable[[Sequence[DurableRecord]], None],
        executor: Executor,
        *,
        deadline: timedelta,
    ) -> None:
        """`write` blocks until its records are durable, or raises `AuditUnavailableError`; it runs in `executor`.

        `deadline`: how long a caller waits.
        """
        self._write = write
        self._executor = executor
        self._deadline = deadline.total_seconds()
        self._waiting: list[tuple[Sequence[DurableRecord], asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._writing = 0
        self._writing_since = 0.0
        """By the loop's clock; of use while there is a `_writer`."""

    @property
    def unwritten(self) -> int:
        """How many records wait, or are in a write that has not returned."""
        return self._writing + sum(len(records) for records, done in self._waiting if not done.done())

    async def __call__(self, records: Sequence[DurableRecord]) -> None:
        """Return when `records` are durable. Raises `AuditUnavailableError`, after the deadline at the latest.

        A caller that gives up or is cancelled while its records wait leaves no record. One whose records are being
        written may leave them: they count as issued.
        """
        loop = asyncio.get_running_loop()
        if self._writer is None:
            self._writing_since = loop.time()
            self._writer = loop.create_task(self._write_groups())
        elif loop.time() - self._writing_since > self._deadline:
            raise AuditUnavailableError(_HANGING)
        done = loop.create_future()
        self._waiting.append((records, done))
        timer = loop.call_later(self._deadline, _give_up, done)
        try:
            await done
        finally:
            timer.cancel()

    async def _write_groups(self) -> None:
        """Write group after group until nobody waits."""
        loop = asyncio.get_running_loop()
        try:
            while group := self._next_group():
                self._writing_since = loop.time()
                failure: AuditUnavailableError | None = None
                try:
                    records = [record for records, _ in group for record in records]
                    self._writing = len(records)
                    await loop.run_in_executor(self._executor, self._write, records)
                except AuditUnavailableError as error:
                    failure = error
                except Exception as error:  # noqa: BLE001 - not known to be durable, so nobody gets a token for it
                    failure = AuditUnavailableError(f"the audit file failed: {error!r}")
                self._writing = 0
                for _, done in group:
                    if not done.done():
                        done.set_result(None) if failure is None else done.set_exception(failure)
        finally:
            self._writer = None

    def _next_group(self) -> list[tuple[Sequence[DurableRecord], asyncio.Future[None]]]:
        """Take all that wait. Who gave up gets no token, so its record would tell of one that never was."""
        group, self._waiting = self._waiting, []
        return [(records, done) for records, done in group if not done.done()]


def _give_up(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_exception(AuditUnavailableError(_HANGING))
