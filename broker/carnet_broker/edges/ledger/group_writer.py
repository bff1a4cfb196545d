"""Many threads, one disk: whoever comes while another writes waits in a group that is written at once.

The first caller that finds nobody writing writes for itself. Those that come meanwhile are the next group, and the
first of them writes for all. With few callers that costs less CPU than handing each record to a thread that only
writes (``tests/bench/group_write.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from carnet_broker.ports import AuditUnavailableError

__all__ = ["GroupWriter"]

_INTERRUPTED: Final = "the thread that wrote for all was interrupted"


@dataclass(slots=True, eq=False)
class _Turn:
    """One caller, and what it wants written."""

    data: bytes
    sync: bool
    woken: threading.Lock = field(default_factory=threading.Lock)
    """Held while it waits: until its data is written, or it is its turn to write."""
    group: list[_Turn] | None = None
    """Those whose data this caller has to write, its own among them; None while it waits for another to do it."""
    failure: str | None = None


class GroupWriter:
    """Calls `write` from one thread at a time, with the data of all that wait. Thread-safe."""

    def __init__(
        self, write: Callable[[bytes, bool], str | None], *, deadline: timedelta, mono: Callable[[], float]
    ) -> None:
        """`write` takes data and whether to sync, and returns why it failed or None. `deadline`: see `commit`."""
        self._write = write
        self._deadline = deadline.total_seconds()
        self._mono = mono
        self._mutex = threading.Lock()
        self._waiting: list[_Turn] = []
        self._writing_since: float | None = None

    @property
    def hangs(self) -> bool:
        """Whether a write has been under way for longer than the deadline."""
        since = self._writing_since
        return since is not None and self._mono() - since > self._deadline

    def commit(self, data: bytes, *, sync: bool) -> None:
        """Return when `data` is written, with a sync after it if `sync`. Raises `AuditUnavailableError`.

        A caller waits for others at most for the deadline, and not at all while `hangs`. A caller that writes waits as
        long as its write does: no thread can be called back from a disk.
        """
        turn = _Turn(data, sync)
        with self._mutex:
            waits = self._writing_since is not None
            if not waits:
                self._writing_since = self._mono()
                turn.group = [turn]
            elif self.hangs:
                raise _hanging()
            else:
                turn.woken.acquire()
                self._waiting.append(turn)
        if waits and not turn.woken.acquire(timeout=self._deadline):
            self._give_up(turn)
        if turn.group is not None:
            self._write_for(turn.group)
        if turn.failure is not None:
            raise AuditUnavailableError(turn.failure)

    def _give_up(self, turn: _Turn) -> None:
        """Leave, unless it has just become this caller's turn to write for the others."""
        with self._mutex:
            if turn.group is None:
                if turn in self._waiting:  # Not yet under way: it need not be written, nobody gets a token for it.
                    self._waiting.remove(turn)
                raise _hanging()

    def _write_for(self, group: list[_Turn]) -> None:
        failure: str | None = _INTERRUPTED
        try:
            failure = self._write(b"".join(turn.data for turn in group), any(turn.sync for turn in group))
        finally:
            with self._mutex:
                following, self._waiting = self._waiting, []
                self._writing_since = self._mono() if following else None
                group[0].failure = failure
                for turn in group[1:]:
                    turn.failure = failure
                    turn.woken.release()
                if following:
                    following[0].group = following
                    following[0].woken.release()


def _hanging() -> AuditUnavailableError:
    return AuditUnavailableError("the disk of the audit record does not answer")
