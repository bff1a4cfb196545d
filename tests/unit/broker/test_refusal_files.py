from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from carnet_broker.core.ledger import OpenedRecord, RefusalRecord
from carnet_broker.edges.ledger.files import LedgerFile
from carnet_broker.edges.ledger.json_lines import JsonLinesAudit, LedgerLimits
from carnet_broker.edges.ledger.refusals import RefusalFiles
from support.audit import records_in, wait_for

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
LARGE = 64 * 1024 * 1024


def refusal(subject: str, at: datetime = NOW) -> RefusalRecord:
    """Return a refusal of somebody."""
    return RefusalRecord(at=at, reason="NOT_GRANTED", subject=subject)


class Bench:
    """Refusal files in a directory, with faults."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sync_error: OSError | None = None
        self.files = self.made()

    def made(self, *, reserve_bytes: int = 0, max_file_bytes: int = LARGE) -> RefusalFiles:
        """Return refusal files of two a second and identity."""
        return RefusalFiles(
            self.directory,
            per_second=2.0,
            reserve_bytes=reserve_bytes,
            max_file_bytes=max_file_bytes,
            new_file=self._new_file,
        )

    def _new_file(self) -> LedgerFile:
        return LedgerFile(
            self.directory, "refused", now=NOW, first_line=OpenedRecord(NOW, "me").to_line(), sync=self._sync
        )

    def _sync(self, descriptor: int) -> None:
        if self.sync_error is not None:
            raise self.sync_error
        os.fdatasync(descriptor)

    def recorded(self) -> list[str]:
        """Return the subjects on record."""
        return [record["sub"] for record in records_in(self.directory, "refusal")]

    def dropped(self) -> list[int]:
        """Return the counts of those that are not."""
        return [record["n"] for record in records_in(self.directory, "dropped")]


@pytest.fixture(name="bench")
def _bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.files.close()


def test_no_file_is_made_before_there_is_a_refusal(bench: Bench):
    """A quiet broker leaves no empty files."""
    assert bench.files.write(NOW, 0.0) is None
    assert [] == list(bench.directory.iterdir())


def test_one_identity_is_capped_and_counted_and_another_is_not_touched(bench: Bench):
    """Eight at once of two a second; the rest is a number."""
    for _ in range(100):
        bench.files.add(refusal("greedy"), 0.0)
    bench.files.add(refusal("other"), 0.0)
    bench.files.write(NOW + SECOND, 0.0)

    assert ["greedy"] * 8 + ["other"] == bench.recorded()
    assert [92] == bench.dropped()
    (dropped,) = records_in(bench.directory, "dropped")
    assert ("2026-11-24T12:00:00.000Z", "2026-11-24T12:00:01.000Z") == (dropped["since"], dropped["at"])


def test_callers_without_identity_share_one_cap(bench: Bench):
    """There is nothing to tell them apart by that they could not change."""
    for number in range(20):
        bench.files.add(RefusalRecord(at=NOW, reason="EXPIRED", peer=f"ipv4:10.0.0.{number}:1"), 0.0)
    bench.files.write(NOW, 0.0)

    assert 8 == len(records_in(bench.directory, "refusal"))
    assert [12] == bench.dropped()


def test_what_waits_is_bounded(bench: Bench):
    """A thousand; many identities cannot fill the memory while the writer is busy."""
    for number in range(1500):
        bench.files.add(refusal(f"identity {number}"), 0.0)
    bench.files.write(NOW, 0.0)

    assert 1000 == len(bench.recorded())
    assert [500] == bench.dropped()


def test_refusals_leave_the_reserve_to_issues(bench: Bench):
    """Too little room: they are counted, no file is made, and the count is written when there is room again."""
    files = bench.made(reserve_bytes=2**62)
    files.add(refusal("a"), 0.0)
    files.add(refusal("b"), 0.0)
    error = files.write(NOW + SECOND, 0.0)

    assert error is not None
    assert "kept for issues" in str(error.strerror)
    assert [] == list(bench.directory.iterdir())

    files._reserve_bytes = 0
    files.write(NOW + 2 * SECOND, 0.5)
    assert [] == bench.dropped()
    files.write(NOW + 3 * SECOND, 1.5)
    files.close()
    assert [2] == bench.dropped()


def test_a_failing_disk_is_left_alone_for_a_second_and_what_is_lost_is_counted(bench: Bench):
    """Nothing is thrown at anybody, and no file is made each time."""
    bench.files.add(refusal("a"), 0.0)
    bench.files.write(NOW, 0.0)
    bench.sync_error = OSError(5, "Input/output error")
    bench.files.add(refusal("b", NOW + SECOND), 1.5)
    error = bench.files.write(NOW + SECOND, 1.5)
    assert error is not None
    assert "Input/output error" == error.strerror
    bench.files.add(refusal("c", NOW + SECOND), 1.6)
    assert bench.files.write(NOW + SECOND, 1.7) is None

    bench.sync_error = None
    bench.files.write(NOW + 2 * SECOND, 3.0)

    assert {"a", "c"} <= set(bench.recorded())
    assert [1] == bench.dropped()


def test_a_full_file_is_followed_by_a_new_one(bench: Bench):
    """As with issues."""
    files = bench.made(max_file_bytes=200)
    for number in range(6):
        files.add(refusal(f"identity {number}"), float(number))
        files.write(NOW, float(number))
    files.close()

    assert 3 <= len(list(bench.directory.glob("refused-*.jsonl")))
    assert 6 == len(bench.recorded())


def test_refusals_are_synced_once_a_second(bench: Bench):
    """They may be lost with the power, not for longer than that."""
    synced: list[int] = []
    bench.files.add(refusal("a"), 0.0)
    bench.files.write(NOW, 0.0)
    bench._sync = synced.append  # type: ignore[method-assign]
    assert bench.files._file is not None
    bench.files._file._sync = synced.append
    for tenth in range(1, 25):
        bench.files.add(refusal("a"), tenth / 10)
        bench.files.write(NOW, tenth / 10)

    assert 2 == len(synced)


def test_the_sink_writes_refusals_while_issues_hang(tmp_path: Path):
    """They are not in each other's way."""
    answers = threading.Event()
    answers.set()

    def sync(_: int) -> None:
        assert answers.wait(30)

    audit = JsonLinesAudit(tmp_path, limits=LedgerLimits(reserve_bytes=0), sync=sync)
    audit.refusal(refusal("first"))
    wait_for(lambda: len(records_in(tmp_path, "refusal")) == 1)
    audit.refusal(refusal("second"))
    wait_for(lambda: len(records_in(tmp_path, "refusal")) == 2)
    audit.close()


def test_the_sink_tells_the_log_once_that_refusals_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """And not twenty times a second."""
    audit = JsonLinesAudit(tmp_path, limits=LedgerLimits(reserve_bytes=2**62))
    for _ in range(5):
        audit.refusal(refusal("a"))
        threading.Event().wait(0.1)
    audit.close()

    told = [message for message in caplog.messages if "refusals are counted" in message]
    assert 1 == len(told)
