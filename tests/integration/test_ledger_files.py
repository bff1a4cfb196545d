"""The audit record on bad days (B14): full disks, dead processes, deleted files, disks that hang. All real but the
hanging and the EIO, which come in by the place of fdatasync.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from carnet.errors import ConfigError
from carnet_broker.core.ledger import IssueRecord
from carnet_broker.edges.ledger.json_lines import Durability, JsonLinesAudit, LedgerLimits
from carnet_broker.ports import AuditUnavailableError
from support import ledger_process
from support.audit import fill_up, lines_of, records_in, wait_for

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
LIMITS = LedgerLimits(pause=timedelta(milliseconds=50), deadline=timedelta(milliseconds=200))
ISSUE = IssueRecord(
    at=NOW,
    token_id="jti",
    kid="kid",
    subject="spiffe://prod.example/ns/shop/sa/orders",
    audience="payments",
    scopes=("charge",),
    expires_at=NOW + timedelta(minutes=5),
    certificate="thumbprint",
    policy="p1",
)


def record(name: object) -> IssueRecord:
    """Return a record with an id."""
    return replace(ISSUE, token_id=str(name))


def ids(directory: Path) -> list[str]:
    """Return the ids on record."""
    return [issued["jti"] for issued in records_in(directory, "issue")]


@contextmanager
def audit_in(directory: Path, **arguments: object) -> Iterator[JsonLinesAudit]:
    """Keep an audit record in `directory` for a while."""
    audit = JsonLinesAudit(directory, **{"limits": LIMITS, **arguments})  # type: ignore[arg-type]
    try:
        yield audit
    finally:
        audit.close()


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_are_private_to_the_broker_and_not_inherited(tmp_path: Path):
    """Mode 0600 in a directory of mode 0700, closed on exec."""
    directory = tmp_path / "audit"
    with audit_in(directory) as audit:
        audit.issue([record(1)])
        (path,) = directory.iterdir()
        assert audit._file is not None
        assert fcntl.fcntl(audit._file._descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert fcntl.fcntl(audit._file._descriptor, fcntl.F_GETFL) & os.O_APPEND

    assert 0o600 == stat.S_IMODE(path.stat().st_mode)
    assert 0o700 == stat.S_IMODE(directory.stat().st_mode)
    assert ["opened", "issue"] == [line["kind"] for line in lines_of(path)]


@pytest.mark.parametrize("durability", list(Durability))
def test_a_full_file_is_followed_by_a_new_one(durability: Durability, tmp_path: Path):
    """Every record is in exactly one of them."""
    with audit_in(tmp_path, durability=durability, limits=replace(LIMITS, max_file_bytes=2000)) as audit:
        for number in range(30):
            audit.issue([record(number)])

    paths = list(tmp_path.glob("issued-*.jsonl"))
    assert len(paths) >= 4
    assert all(path.stat().st_size < 3000 for path in paths)
    assert sorted(map(str, range(30))) == sorted(ids(tmp_path))


def test_a_new_day_begins_a_new_file(tmp_path: Path):
    """At midnight UTC, not at noon."""
    moments = [NOW.replace(hour=23, minute=59)]
    with audit_in(tmp_path, now=lambda: moments[-1]) as audit:
        audit.issue([record(1)])
        moments.append(NOW.replace(hour=23, minute=59, second=59))
        audit.issue([record(2)])
        moments.append(NOW.replace(day=25, hour=0))
        audit.issue([record(3)])

    names = sorted(path.name[:15] for path in tmp_path.iterdir())
    assert ["issued-20261124", "issued-20261125"] == names


def test_only_the_torn_line_of_a_dead_writer_is_cut_off(tmp_path: Path):
    """At start. Whole lines, files of others and files of the living stay as they are."""

    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    torn = file("issued-20261123T000000.000000Z-00000000000000aa.jsonl", b'{"a":1}\n{"b":2}\n{"c"')
    long = file("issued-20261123T000000.000000Z-00000000000000ab.jsonl", b'{"a":1}\n' + b"x" * 200_000)
    headless = file("refused-20261123T000000.000000Z-00000000000000ac.jsonl", b'{"a"')
    whole = file("issued-20261123T000000.000000Z-00000000000000ad.jsonl", b'{"a":1}\n')
    empty = file("issued-20261123T000000.000000Z-00000000000000ae.jsonl", b"")
    foreign = file("notes.jsonl", b"no line feed")
    alive = file("issued-20261123T000000.000000Z-00000000000000af.jsonl", b'{"a"')
    (tmp_path / "issued-20261123T000000.000000Z-00000000000000b0.jsonl").symlink_to(foreign)

    with alive.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with audit_in(tmp_path) as audit:
            audit.issue([record(1)])

    assert b'{"a":1}\n{"b":2}\n' == torn.read_bytes()
    assert b'{"a":1}\n' == long.read_bytes() == whole.read_bytes()
    assert b"" == headless.read_bytes() == empty.read_bytes()
    assert b"no line feed" == foreign.read_bytes()
    assert b'{"a"' == alive.read_bytes()


def test_two_writers_share_a_directory_each_with_its_own_file(tmp_path: Path):
    """B14: neither mends, nor writes into, what the other writes."""
    with audit_in(tmp_path) as first, audit_in(tmp_path) as second:
        threads = [
            threading.Thread(
                target=lambda audit=audit, name=name: [audit.issue([record(f"{name}{n}")]) for n in range(40)]
            )
            for audit, name in ((first, "a"), (second, "b"))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert sorted(f"{name}{n}" for name in "ab" for n in range(40)) == sorted(ids(tmp_path))
    for path in tmp_path.iterdir():
        assert 1 == len({line["jti"][0] for line in lines_of(path) if line["kind"] == "issue"})


# -- full disks --------------------------------------------------------------------------------------------------------


def test_b14_a_device_that_is_full_is_left_for_a_new_file(tmp_path: Path):
    """/dev/full under the open file: that call is refused, and the record goes on in another file by itself."""
    with audit_in(tmp_path) as audit:
        audit.issue([record(1)])
        fill_up(audit)
        with pytest.raises(AuditUnavailableError, match="No space left on device"):
            audit.issue([record(2)])
        assert not audit.writable
        with pytest.raises(AuditUnavailableError):
            audit.issue([record(3)])
        wait_for(lambda: audit.writable)
        audit.issue([record(4)])

    assert ["1", "4"] == ids(tmp_path)


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "carnet-test", str(directory)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.fail(f"run this test as root, with the right to mount: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)  # noqa: S607


def test_b14_a_full_disk_stops_issuing_until_there_is_room(small_disk: Path):
    """Refused at once, no litter while it is full, and recovery with no restart."""
    with audit_in(small_disk / "audit") as audit:
        audit.issue([record(1)])
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(b"x" * 300_000)
        with pytest.raises(AuditUnavailableError, match="No space left on device"):
            audit.issue([record(number) for number in range(2, 100)])
        started = time.perf_counter()
        for _ in range(10):
            with pytest.raises(AuditUnavailableError):
                audit.issue([record("refused")])
        assert time.perf_counter() - started < 1  # Ten deadlines would be two seconds.
        time.sleep(0.3)
        # While it tries again there is one more, for a moment.
        wait_for(lambda: 1 == len(list((small_disk / "audit").iterdir())))
        assert not audit.writable

        filler.unlink()
        wait_for(lambda: audit.writable)
        audit.issue([record("after")])

    recorded = ids_of_whole_lines(small_disk / "audit")
    assert "1" in recorded
    assert "after" in recorded
    assert "refused" not in recorded


def ids_of_whole_lines(directory: Path) -> list[str]:
    """Return the ids in all lines that are whole."""
    lines = [line for path in directory.glob("issued-*.jsonl") for line in path.read_bytes().split(b"\n")[:-1]]
    return [json.loads(line).get("jti") for line in lines]


def start(
    directory: Path, durability: Durability, name: str, *, file_limit: int | None = None
) -> subprocess.Popen[str]:
    """Start a process that writes records until it is killed."""
    command = [sys.executable, ledger_process.__file__, str(directory), durability, name, str(file_limit or "")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_b14_a_limit_on_file_size_costs_a_pause_and_no_record(tmp_path: Path):
    """RLIMIT_FSIZE: the kernel cuts a write short; the file is left, and a new one takes the next records."""
    process = start(tmp_path, Durability.FSYNC, "x", file_limit="3000")
    assert process.stdout is not None
    told = [process.stdout.readline().strip() for _ in range(60)]
    process.kill()
    told += process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()

    with audit_in(tmp_path):
        pass
    refused = [line for line in told if line.startswith("refused")]
    assert any("File too large" in line for line in refused)
    acknowledged = {line for line in told[:-1] if not line.startswith("refused")}
    assert len(acknowledged) >= 10
    assert acknowledged <= set(ids(tmp_path))
    assert all(path.stat().st_size <= 3000 for path in tmp_path.glob("issued-*"))


# -- dead processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", list(Durability))
def test_b14_what_was_acknowledged_survives_kill_9(durability: Durability, tmp_path: Path):
    """Three writers at once, killed in the middle of it; the next start finds every record that was acknowledged."""
    processes = [start(tmp_path, durability, name) for name in "abc"]
    acknowledged: set[str] = set()
    for process in processes:
        assert process.stdout is not None
        for _ in range(50):
            acknowledged.add(process.stdout.readline().strip())
    for process in processes:
        process.kill()
    for process in processes:
        assert process.stdout is not None
        acknowledged |= {line.strip() for line in process.stdout if line.endswith("\n")}
        process.wait()
        process.stdout.close()

    with audit_in(tmp_path) as audit:
        audit.issue([record("next")])

    assert acknowledged | {"next"} <= set(ids(tmp_path))
    assert 4 == len(list(tmp_path.iterdir()))


# -- files that go away ------------------------------------------------------------------------------------------------


def test_b14_a_deleted_file_is_noticed_before_a_token_leaves(tmp_path: Path):
    """The record would be durable in a file that nobody can open."""
    with audit_in(tmp_path) as audit:
        audit.issue([record(1)])
        for path in tmp_path.iterdir():
            path.unlink()
        with pytest.raises(AuditUnavailableError, match=r"deleted|No such file"):
            audit.issue([record(2)])
        wait_for(lambda: audit.writable)
        audit.issue([record(3)])

    assert ["3"] == ids(tmp_path)


def test_b14_a_deleted_directory_stops_issuing_until_it_is_back(tmp_path: Path):
    """It is not made again: who took it away may be about to mount another."""
    directory = tmp_path / "audit"
    with audit_in(directory) as audit:
        shutil.rmtree(directory)
        for _ in range(3):
            with pytest.raises(AuditUnavailableError):
                audit.issue([record(1)])
            time.sleep(0.06)
        directory.mkdir()
        wait_for(lambda: audit.writable)
        audit.issue([record(2)])

    assert ["2"] == ids(directory)


def test_b14_a_file_that_was_moved_away_keeps_its_records(tmp_path: Path):
    """As log rotation does: the open file goes on under its new name, until the next is due."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with audit_in(tmp_path / "audit") as audit:
        audit.issue([record(1)])
        for path in (tmp_path / "audit").iterdir():
            path.rename(elsewhere / path.name)
        audit.issue([record(2)])

    assert ["1", "2"] == ids(elsewhere) + ids(tmp_path / "audit")


@contextmanager
def without_rights() -> Iterator[None]:
    """Be nobody for a while: root may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def change_mode(path: Path, mode: int) -> None:
    """Change the mode of a file of root's, being nobody; of one's own otherwise."""
    if os.getuid() == 0:
        os.seteuid(0)
    path.chmod(mode)
    if os.getuid() == 0:
        os.seteuid(65534)


def test_b14_a_directory_without_permission_is_named_at_start():
    """EACCES, ENOTDIR, ENOENT: one line that says which directory, what is wrong, and which setting."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "audit"
        directory.mkdir(mode=0o500)
        file = Path(name) / "file"
        file.touch()
        Path(name).chmod(0o755)
        with without_rights():
            for wrong, why in (
                (directory, "Permission denied"),
                (file, "File exists|Not a directory"),
                (file / "below", "Not a directory"),
                (Path(name) / "no" / "parent", "No such file"),
            ):
                with pytest.raises(ConfigError, match=f"^{wrong}: .*({why}).*audit.directory"):
                    JsonLinesAudit(wrong)


def test_b14_a_permission_that_is_lost_stops_issuing_until_it_is_back():
    """At the next file that is due."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "audit"
        directory.mkdir()
        Path(name).chmod(0o755)
        directory.chmod(0o777)
        with without_rights(), audit_in(directory, limits=replace(LIMITS, max_file_bytes=100)) as audit:
            audit.issue([record(1)])
            change_mode(directory, 0o555)
            with pytest.raises(AuditUnavailableError, match="Permission denied"):
                audit.issue([record(2)])
            change_mode(directory, 0o777)
            wait_for(lambda: audit.writable)
            audit.issue([record(3)])
        assert ["1", "3"] == sorted(ids(directory))


# -- disks that fail or hang -------------------------------------------------------------------------------------------


def test_b14_a_failed_sync_is_the_end_of_the_file(tmp_path: Path):
    """EIO: the kernel forgets what it could not write, so a second sync that succeeds proves nothing."""
    failures = iter([None, None, OSError(errno.EIO, "Input/output error")])

    def sync(descriptor: int) -> None:
        failure = next(failures, None)
        if failure is not None:
            raise failure
        os.fdatasync(descriptor)

    with audit_in(tmp_path, sync=sync) as audit:
        audit.issue([record(1)])
        first = audit._file
        with pytest.raises(AuditUnavailableError, match="Input/output error"):
            audit.issue([record(2)])
        wait_for(lambda: audit.writable)
        audit.issue([record(3)])
        assert first is not audit._file

    assert 2 == len(list(tmp_path.iterdir()))
    assert {"1", "3"} <= set(ids(tmp_path))


def test_b14_those_that_wait_behind_a_failure_are_refused_with_it(tmp_path: Path):
    """None of them tries a new file before the pause is over, and all are told why."""
    failing = threading.Event()

    def sync(_: int) -> None:
        time.sleep(0.05)
        if failing.is_set():
            raise OSError(errno.EIO, "Input/output error")

    limits = replace(LIMITS, deadline=timedelta(seconds=5), pause=timedelta(seconds=2))
    with audit_in(tmp_path, sync=sync, limits=limits) as audit:
        failing.set()
        threads, outcomes = in_threads(audit, 10)
        for thread in threads:
            thread.join()
        failing.clear()

    assert 10 == len(outcomes)
    assert {True} == {outcome is not None and "Input/output error" in outcome for outcome in outcomes}
    assert 1 == len(list(tmp_path.iterdir()))


class Disk:
    """Stands for fdatasync: takes its time, or hangs until it is let go."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self._seconds = seconds

    def sync(self, _: int) -> None:
        """Sync in the disk's own time."""
        time.sleep(self._seconds)
        assert self.answers.wait(30)


def in_threads(audit: JsonLinesAudit, count: int) -> tuple[list[threading.Thread], list[str | None]]:
    """Issue one record from each of `count` threads; return them and the list that gets what became of each."""
    outcomes: list[str | None] = []

    def work(number: int) -> None:
        try:
            audit.issue([record(f"thread {number}")])
        except AuditUnavailableError as error:
            outcomes.append(str(error))
        else:
            outcomes.append(None)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads, outcomes


def test_b14_a_disk_that_hangs_refuses_those_that_wait_within_the_deadline_and_recovers(tmp_path: Path):
    """One caller is with the disk; the others are refused after 200 ms, and later ones at once."""
    disk = Disk()
    with audit_in(tmp_path, sync=disk.sync) as audit:
        audit.issue([record(1)])
        disk.answers.clear()
        threads, outcomes = in_threads(audit, 4)
        wait_for(lambda: len(outcomes) == 3)
        assert {"the disk of the audit record does not answer"} == set(outcomes)
        assert not audit.writable
        started = time.perf_counter()
        for _ in range(5):
            with pytest.raises(AuditUnavailableError, match="does not answer"):
                audit.issue([record("late")])
        assert time.perf_counter() - started < 0.5  # Five deadlines would be a second.

        disk.answers.set()
        for thread in threads:
            thread.join()
        assert audit.writable
        audit.issue([record(2)])

    assert 1 == outcomes.count(None)
    recorded = ids(tmp_path)
    assert "late" not in recorded
    # Those that gave up while they waited are not on record: no token of theirs exists.
    assert 1 == sum(name.startswith("thread") for name in recorded)


@pytest.mark.parametrize("durability", list(Durability))
def test_b14_a_disk_that_hangs_does_not_keep_the_record_from_closing(durability: Durability, tmp_path: Path):
    """`close` returns after the deadline; when the disk answers at last, the file is let go with whole records."""
    disk = Disk()
    audit = JsonLinesAudit(tmp_path, durability=durability, limits=LIMITS, sync=disk.sync)
    audit.issue([record(1)])
    disk.answers.clear()
    threads, outcomes = in_threads(audit, 1)
    wait_for(lambda: audit._hangs)  # In that thread, or in the one that syncs what was only written.
    started = time.perf_counter()
    audit.close()
    assert time.perf_counter() - started < 5
    with pytest.raises(AuditUnavailableError, match="shutting down"):
        audit.issue([record("late")])

    disk.answers.set()
    for thread in [*threads, audit._thread]:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert audit._file is None
    assert ["1", "thread 0"][: 1 + outcomes.count(None)] == ids(tmp_path)


def test_a_sync_that_fails_while_the_record_closes_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """With `durability: write` it is the last chance to hear of it."""
    failing = threading.Event()

    def sync(_: int) -> None:
        if failing.is_set():
            raise OSError(errno.EIO, "Input/output error")

    with audit_in(tmp_path, sync=sync, durability=Durability.WRITE) as audit:
        failing.set()
        with audit._lock:  # So that the thread does not sync before the end.
            audit._closing.set()
            audit._dirty = True
    assert ["ERROR"] == [entry.levelname for entry in caplog.records]
    assert "Input/output error" in caplog.text


def test_a_writer_that_is_interrupted_holds_up_nobody_and_leaves_no_half_line_behind(tmp_path: Path):
    """Control-C in the middle of a write: the file is free again, and the next record goes into a new one."""
    disk = Disk(seconds=0.1)
    interrupted = threading.Event()

    def sync(descriptor: int) -> None:
        disk.sync(descriptor)
        if interrupted.is_set():
            interrupted.clear()
            raise KeyboardInterrupt

    with audit_in(tmp_path, sync=sync, limits=replace(LIMITS, deadline=timedelta(seconds=5))) as audit:
        first = audit._file
        interrupted.set()
        with pytest.raises(KeyboardInterrupt):
            audit.issue([record(1)])
        audit.issue([record(2)])
        assert first is not audit._file

    assert "2" in ids(tmp_path)
