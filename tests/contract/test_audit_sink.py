"""What every audit sink must do. The memory one is held to it too, so that tests that use it prove something."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from carnet_broker.core.ledger import IssueRecord, RefusalRecord
from carnet_broker.edges.ledger.json_lines import Durability, JsonLinesAudit, LedgerLimits
from carnet_broker.ports import AuditSink, AuditUnavailableError
from support.audit import MemoryAudit, fill_up, records_in, wait_for

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
ISSUE = IssueRecord(
    at=NOW,
    token_id="jti-0",
    kid="kid",
    subject="spiffe://prod.example/ns/shop/sa/orders",
    audience="payments",
    scopes=("charge",),
    expires_at=NOW + timedelta(minutes=5),
    certificate="thumbprint",
    policy="p1",
)
REFUSAL = RefusalRecord(at=NOW, reason="NOT_GRANTED", subject=ISSUE.subject, audience="bank")


@dataclass
class Bench:
    """A sink, and what a test has to know of it."""

    sink: AuditSink
    issued: Callable[[], list[str]]
    """The ids that are on record."""
    refused: Callable[[], int]
    """How many refusals are on record; after `close`."""
    fail: Callable[[], None]
    """Make the medium fail."""
    repair: Callable[[], None]
    """Make it work again; after a call that failed."""


def files(directory: Path, durability: Durability) -> Bench:
    """Return a bench for the sink that writes files."""
    failing = threading.Event()

    def sync(_: int) -> None:
        if failing.is_set():
            raise OSError(5, "Input/output error")

    limits = LedgerLimits(pause=timedelta(milliseconds=50))
    audit = JsonLinesAudit(directory, durability=durability, limits=limits, sync=sync)

    def fail() -> None:
        failing.set()  # No new file can be made durable...
        fill_up(audit)  # ...and the one that is open takes no more.

    def repair() -> None:
        failing.clear()
        wait_for(lambda: audit.writable)

    return Bench(
        audit,
        issued=lambda: [record["jti"] for record in records_in(directory, "issue")],
        refused=lambda: len(records_in(directory, "refusal")),
        fail=fail,
        repair=repair,
    )


def memory() -> Bench:
    """Return a bench for the sink in memory."""
    audit = MemoryAudit()
    return Bench(
        audit,
        issued=lambda: [record.token_id for record in audit.issued],
        refused=lambda: len(audit.refused),
        fail=lambda: setattr(audit, "failing", True),
        repair=lambda: setattr(audit, "failing", False),
    )


@pytest.fixture(name="bench", params=["fsync", "write", "memory"])
def _bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    bench = memory() if request.param == "memory" else files(tmp_path / "audit", Durability(request.param))
    yield bench
    bench.sink.close()


def numbered(*numbers: int) -> list[IssueRecord]:
    """Return records with the ids jti-N."""
    return [replace(ISSUE, token_id=f"jti-{number}") for number in numbers]


def test_an_issue_is_on_record_when_the_call_returns(bench: Bench):
    """Not some time after."""
    bench.sink.issue(numbered(1))
    assert ["jti-1"] == bench.issued()


def test_the_records_of_one_call_are_all_there_in_their_order(bench: Bench):
    """A batch of tokens is one call."""
    bench.sink.issue(numbered(*range(50)))
    bench.sink.issue(numbered(50))

    assert [f"jti-{number}" for number in range(51)] == bench.issued()


def test_no_records_are_no_work_and_no_error(bench: Bench):
    """A batch in which all was refused."""
    bench.sink.issue([])
    assert [] == bench.issued()


def test_what_cannot_be_recorded_is_told_and_later_calls_work_again(bench: Bench):
    """B14: no token without a record, and recovery without a restart."""
    bench.sink.issue(numbered(1))
    bench.fail()
    for number in (2, 3):
        with pytest.raises(AuditUnavailableError):
            bench.sink.issue(numbered(number))
    bench.repair()
    bench.sink.issue(numbered(4))

    recorded = bench.issued()
    assert {"jti-1", "jti-4"} <= set(recorded)
    assert len(recorded) == len(set(recorded))


def test_a_refusal_is_on_record_after_the_sink_is_closed(bench: Bench):
    """At the latest."""
    bench.sink.refusal(REFUSAL)
    bench.sink.refusal(replace(REFUSAL, subject=""))
    bench.sink.close()

    assert 2 == bench.refused()


def test_a_refusal_is_never_an_error(bench: Bench):
    """Whoever is refused must not be able to break anything by it."""
    bench.fail()
    for _ in range(100):
        bench.sink.refusal(REFUSAL)
    with pytest.raises(AuditUnavailableError):
        bench.sink.issue(numbered(0))
    bench.repair()
    bench.sink.issue(numbered(1))

    assert ["jti-1"] == bench.issued()


def test_a_closed_sink_takes_no_issue_and_closes_twice(bench: Bench):
    """What is issued while the broker goes down would be unrecorded."""
    bench.sink.issue(numbered(1))
    bench.sink.close()
    bench.sink.close()

    with pytest.raises(AuditUnavailableError):
        bench.sink.issue(numbered(2))
    bench.sink.refusal(REFUSAL)
    assert ["jti-1"] == bench.issued()


def issued_so_far(bench: Bench) -> list[str]:
    """Return what is recorded while others go on recording: the line that is written just now may be read in part."""
    for _ in range(100):
        with suppress(json.JSONDecodeError):
            return bench.issued()
    return bench.issued()


def test_many_threads_each_get_what_they_recorded(bench: Bench):
    """Each call's records are there once when it returns, whoever wrote them."""
    seen: list[bool] = []

    def work(thread: int) -> None:
        for turn in range(20):
            number = thread * 100 + turn
            bench.sink.issue(numbered(number))
            seen.append(f"jti-{number}" in issued_so_far(bench))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [True] * 160 == seen
    assert 160 == len(set(bench.issued())) == len(bench.issued())
