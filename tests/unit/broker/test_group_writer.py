from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest

from carnet_broker.edges.ledger.group_writer import GroupWriter, _Turn
from carnet_broker.ports import AuditUnavailableError
from support.audit import wait_for


class Medium:
    """Takes groups, one at a time, when it is let."""

    def __init__(self) -> None:
        self.groups: list[tuple[bytes, bool]] = []
        self.open = threading.Event()
        self.failure: str | BaseException | None = None
        self._busy = threading.Lock()

    def write(self, data: bytes, sync: bool) -> str | None:
        """Take one group."""
        assert self._busy.acquire(blocking=False), "two threads write at once"
        try:
            self.groups.append((data, sync))
            assert self.open.wait(10)
            if isinstance(self.failure, BaseException):
                raise self.failure
            return self.failure
        finally:
            self._busy.release()


class Callers:
    """Threads that commit, and what became of each."""

    def __init__(self, writer: GroupWriter) -> None:
        self.outcomes: dict[bytes, str | None] = {}
        self._writer = writer
        self._threads: list[threading.Thread] = []

    def commit(self, data: bytes, *, sync: bool = True) -> None:
        """Start one; return when it waits or is done."""
        waiting = len(self._writer._waiting)
        idle = self._writer._writing_since is None

        def work() -> None:
            try:
                self._writer.commit(data, sync=sync)
            except AuditUnavailableError as error:
                self.outcomes[data] = str(error)
            except KeyboardInterrupt:
                self.outcomes[data] = "interrupted"
            else:
                self.outcomes[data] = None

        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()
        wait_for(lambda: self._writer._writing_since is not None if idle else len(self._writer._waiting) > waiting)

    def join(self) -> None:
        """Wait for all."""
        for thread in self._threads:
            thread.join(timeout=10)
            assert not thread.is_alive()


@pytest.fixture(name="medium")
def _medium() -> Medium:
    return Medium()


def writer_to(medium: Medium, deadline: float = 10.0) -> GroupWriter:
    """Return a writer."""
    return GroupWriter(medium.write, deadline=timedelta(seconds=deadline), mono=time.monotonic)


def test_a_single_caller_writes_for_itself(medium: Medium):
    """In its own thread, with nobody to wake."""
    medium.open.set()
    writer = writer_to(medium)
    writer.commit(b"a", sync=True)
    writer.commit(b"b", sync=False)

    assert [(b"a", True), (b"b", False)] == medium.groups


def test_those_that_come_while_one_writes_are_one_group_in_their_order(medium: Medium):
    """Two writes for five callers; one that wants a sync gets it for all."""
    callers = Callers(writer_to(medium))
    for name in (b"a", b"b", b"c", b"d", b"e"):
        callers.commit(name, sync=name in (b"a", b"d"))
    medium.open.set()
    callers.join()

    assert [(b"a", True), (b"bcde", True)] == medium.groups
    assert dict.fromkeys((b"a", b"b", b"c", b"d", b"e")) == callers.outcomes


def test_a_failure_is_told_to_its_whole_group_and_to_no_other(medium: Medium):
    """The next group has its own fortune."""
    writer = writer_to(medium)
    callers = Callers(writer)
    for name in (b"a", b"b", b"c"):
        callers.commit(name)
    medium.failure = "no room"
    medium.open.set()
    callers.join()
    assert {b"a": "no room", b"b": "no room", b"c": "no room"} == callers.outcomes

    medium.failure = None
    writer.commit(b"d", sync=True)


def test_an_interrupted_writer_releases_all_that_wait(medium: Medium):
    """Its own group is refused; the next one is written by one of its own."""
    writer = writer_to(medium)
    callers = Callers(writer)
    for name in (b"a", b"b", b"c"):
        callers.commit(name)
    medium.failure = KeyboardInterrupt()
    medium.open.set()
    callers.join()

    interrupted = "the thread that wrote for all was interrupted"
    assert "interrupted" == callers.outcomes[b"a"]
    assert ["interrupted", interrupted] == sorted(filter(None, (callers.outcomes[b"b"], callers.outcomes[b"c"])))
    medium.failure = None
    writer.commit(b"d", sync=True)


def test_who_gives_up_waiting_is_not_written(medium: Medium):
    """It is refused, so nothing of it may be on record; one whose data is under way is refused all the same."""
    writer = writer_to(medium, deadline=0.1)
    callers = Callers(writer)
    callers.commit(b"a")
    callers.commit(b"b")
    wait_for(lambda: b"b" in callers.outcomes)
    assert writer.hangs
    with pytest.raises(AuditUnavailableError, match="does not answer"):
        writer.commit(b"c", sync=True)
    medium.open.set()
    callers.join()

    assert {b"a": None, b"b": "the disk of the audit record does not answer"} == callers.outcomes
    assert [(b"a", True)] == medium.groups
    assert not writer.hangs
    with pytest.raises(AuditUnavailableError):
        writer._give_up(_Turn(b"under way", sync=True))


def test_who_is_to_write_for_others_does_not_give_up(medium: Medium):
    """Its deadline and its turn came together: if it left, the others would wait for nobody."""
    turn = _Turn(b"a", sync=True)
    turn.group = [turn]

    writer_to(medium)._give_up(turn)
