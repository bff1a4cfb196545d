"""How many calls share one write, and what each is told. The write is a real thread that the test holds up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest

from carnet_broker.core.ledger import IssueRecord
from carnet_broker.group_commit import GroupCommit, _give_up
from carnet_broker.ports import AuditUnavailableError

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


def record(name: str) -> IssueRecord:
    """Return a record with an id."""
    return IssueRecord(
        at=NOW,
        token_id=name,
        kid="kid",
        subject="spiffe://prod.example/ns/shop/sa/orders",
        audience="payments",
        scopes=("charge",),
        expires_at=NOW + timedelta(minutes=5),
        certificate="thumbprint",
        policy="p1",
    )


@dataclass
class Medium:
    """Takes groups, one at a time, when it is let; fails when it is told to."""

    groups: list[list[str]] = field(default_factory=list)
    answers: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def write(self, records: Sequence[IssueRecord]) -> None:
        """Take one group."""
        self.groups.append([record.token_id for record in records])
        self.started.release()
        assert self.answers.wait(10)
        if self.failure is not None:
            raise self.failure


@pytest.fixture(name="medium")
def _medium() -> Medium:
    return Medium()


@pytest.fixture(name="thread")
def _thread(medium: Medium) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=1) as executor:
        yield executor
        medium.answers.set()


async def under_way(medium: Medium) -> None:
    """Wait until a write has begun."""
    assert await asyncio.to_thread(medium.started.acquire, timeout=10)


async def started(*calls: asyncio.Task[None]) -> None:
    """Let tasks run until they wait."""
    await asyncio.sleep(0)
    assert not any(call.done() for call in calls)


def calls_of(commit: GroupCommit, *names: str) -> list[asyncio.Task[None]]:
    """Begin one call for each name."""
    return [asyncio.create_task(commit([record(name)])) for name in names]


async def test_a_call_returns_when_its_records_are_written_and_not_before(medium: Medium, thread: ThreadPoolExecutor):
    """All records of the call go out together."""
    commit = GroupCommit(medium.write, thread, deadline=timedelta(seconds=10))
    call = asyncio.create_task(commit([record("a"), record("b")]))
    await under_way(medium)
    assert not call.done()
    medium.answers.set()
    await call

    assert [["a", "b"]] == medium.groups


async def test_those_that_come_while_one_write_is_under_way_share_the_next(medium: Medium, thread: ThreadPoolExecutor):
    """Two writes for five calls, in their order; a call after a quiet time begins anew."""
    commit = GroupCommit(medium.write, thread, deadline=timedelta(seconds=10))
    first = calls_of(commit, "a")
    await under_way(medium)
    later = calls_of(commit, "b", "c", "d", "e")
    await started(*first, *later)
    medium.answers.set()
    await asyncio.gather(*first, *later)
    await commit([record("f")])

    assert [["a"], ["b", "c", "d", "e"], ["f"]] == medium.groups


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (AuditUnavailableError("no room"), "no room"),
        (ZeroDivisionError("nobody thought of it"), "the audit file failed: ZeroDivisionError"),
    ],
)
async def test_a_failure_is_told_to_its_whole_group_and_to_no_other(
    failure: Exception, told: str, medium: Medium, thread: ThreadPoolExecutor
):
    """Whatever it is: what is not known to be durable is refused. The next group has its own fortune."""
    commit = GroupCommit(medium.write, thread, deadline=timedelta(seconds=10))
    first = calls_of(commit, "a")
    await under_way(medium)
    later = calls_of(commit, "b", "c")
    await started(*later)
    medium.failure = failure
    medium.answers.set()
    outcomes = await asyncio.gather(*first, *later, return_exceptions=True)

    assert [AuditUnavailableError] * 3 == [type(outcome) for outcome in outcomes]
    assert all(told in str(outcome) for outcome in outcomes)
    medium.failure = None
    await commit([record("d")])


async def test_a_thread_that_takes_no_more_work_is_a_refusal(medium: Medium, thread: ThreadPoolExecutor):
    """As while the broker goes down."""
    commit = GroupCommit(medium.write, thread, deadline=timedelta(seconds=10))
    thread.shutdown()
    with pytest.raises(AuditUnavailableError, match="the audit file failed"):
        await commit([record("a")])

    assert [] == medium.groups


async def test_b14_a_disk_that_hangs_refuses_each_call_within_the_deadline_and_later_ones_at_once(
    medium: Medium, thread: ThreadPoolExecutor
):
    """The thread with the disk cannot be called back, its callers can. Nothing collects meanwhile, and it recovers."""
    commit = GroupCommit(medium.write, thread, deadline=timedelta(milliseconds=200))
    loop = asyncio.get_running_loop()
    began = loop.time()
    hanging = calls_of(commit, "with the disk")
    await under_way(medium)
    hanging += calls_of(commit, "behind it")
    outcomes = await asyncio.gather(*hanging, return_exceptions=True)
    assert 0.19 < loop.time() - began < 2
    assert ["the audit file did not take the record in time: is its disk hanging?"] * 2 == list(map(str, outcomes))

    await asyncio.sleep(0.05)
    began = loop.time()
    for _ in range(20):
        with pytest.raises(AuditUnavailableError, match="is its disk hanging"):
            await commit([record("late")])
    assert loop.time() - began < 0.2  # Twenty deadlines would be four seconds.
    assert len(commit._waiting) <= 1

    medium.answers.set()
    assert commit._writer is not None
    await commit._writer
    await commit([record("after")])

    # Who gave up while it waited is not on record: no token of its exists. What the disk had may be.
    assert [["with the disk"], ["after"]] == medium.groups


async def test_g11_a_call_that_is_cancelled_while_it_waits_leaves_no_record(medium: Medium, thread: ThreadPoolExecutor):
    """One that is being written stays written, and counts as issued; the others of its group are not touched."""
    commit = GroupCommit(medium.write, thread, deadline=timedelta(seconds=10))
    first = calls_of(commit, "a", "b")
    await under_way(medium)
    later = calls_of(commit, "c", "d")
    await started(*later)
    first[0].cancel()
    later[0].cancel()
    await asyncio.sleep(0)
    medium.answers.set()
    outcomes = await asyncio.gather(*first, *later, return_exceptions=True)

    assert [["a", "b"], ["d"]] == medium.groups
    assert [True, False, True, False] == [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes]
    assert [None, None] == [outcomes[1], outcomes[3]]


async def test_a_deadline_that_ends_as_the_answer_comes_changes_nothing():
    """Both can be due in the same turn of the loop."""
    done = asyncio.get_running_loop().create_future()
    done.set_result(None)
    _give_up(done)

    assert await done is None
