"""``carnet-broker demo --hold`` as a process: who may use its directory, and how it ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DEMO = [sys.executable, "-m", "carnet_broker", "demo"]
LONG = 60.0


@contextmanager
def demo(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a demo that holds; it is ended at the end."""
    process = subprocess.Popen(
        [*DEMO, "--hold", "--dir", str(directory)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=LONG)


def wait_for_line(process: subprocess.Popen[str], start: str) -> None:
    """Return once `process` has printed a line that begins so."""
    assert process.stdout is not None
    assert any(line.strip().startswith(start) for line in process.stdout)


def processes_of(directory: Path) -> list[int]:
    """Return the processes that have the directory in their command line or environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:  # It ended meanwhile, or is not ours.
            continue
        if os.fsencode(directory) in text and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def assert_nothing_is_left(directory: Path) -> None:
    """The kernel may take a moment for a process whose parent is gone."""
    end = time.monotonic() + 5
    while (left := processes_of(directory)) and time.monotonic() < end:
        time.sleep(0.05)
    assert [] == left


def test_a_directory_belongs_to_one_demo_which_holds_on_when_a_part_of_it_dies(tmp_path: Path) -> None:
    """A second demo in it is refused and harms nothing. Without payments the first says so once, and goes on."""
    directory = tmp_path / "demo"
    with demo(directory) as first:
        wait_for_line(first, "ready")
        environment = (directory / "env").read_bytes()
        second = subprocess.run(
            [*DEMO, "--dir", str(directory)], capture_output=True, text=True, timeout=LONG, check=False
        )
        expected = f"error: another demo is using {directory}: end that one, or give another --dir\n"
        assert (2, expected) == (second.returncode, second.stderr)
        assert (None, environment) == (first.poll(), (directory / "env").read_bytes())
        (payments,) = (
            pid
            for pid in processes_of(directory)
            if b"carnet_broker.demo.payments" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(payments, signal.SIGKILL)
        assert first.stderr is not None
        expected = f"error: payments ended by itself (exit code -9); its log is {directory}/payments.log\n"
        assert expected == first.stderr.readline()
        first.send_signal(signal.SIGTERM)
        assert (0, "") == (first.wait(LONG), first.stderr.read())
    assert_nothing_is_left(directory)


def test_a_demo_that_holds_can_be_administered_with_what_its_env_says(tmp_path: Path) -> None:
    """The admin revokes, and payments has it; orders, with the same command, may not."""
    directory = tmp_path / "demo"
    with demo(directory) as process:
        wait_for_line(process, "ready")
        lines = (directory / "env").read_text().splitlines()
        env = {name: shlex.split(value)[0] for name, _, value in (line.partition("=") for line in lines)}
        assert env["CARNET_STORE_URL"].startswith("sqlite:////")
        command = [sys.executable, "-m", "carnet_broker", "revoke", "--jti", "3q2-7wAAAAAAAAAAAAAAAA", "--wait"]
        codes = {}
        for who in ("ADMIN", "ORDERS"):
            files = {f"CARNET_{kind}_FILE": env[f"{who}_{kind}_FILE"] for kind in ("CERT", "KEY")}
            done = subprocess.run(
                command, env=os.environ | env | files, capture_output=True, text=True, timeout=LONG, check=False
            )
            codes[who] = done.returncode
    assert {"ADMIN": 0, "ORDERS": 3} == codes


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("Setting", signal.SIGTERM),
        ("- OpenBao", signal.SIGTERM),
        ("- bootstrap", signal.SIGINT),
        ("- certificates", signal.SIGTERM),
        ("- broker", signal.SIGTERM),
        ("- payments", signal.SIGTERM),
    ],
)
def test_a_demo_that_is_told_to_end_while_it_starts_ends_at_once(
    line: str, number: signal.Signals, tmp_path: Path
) -> None:
    """Wherever it is: no process is left, and nobody waits until all is up."""
    directory = tmp_path / "demo"
    with demo(directory) as process:
        wait_for_line(process, line)
        process.send_signal(number)
        output, errors = process.communicate(timeout=LONG)
    assert (130, "error: interrupted") == (process.returncode, errors.strip())
    assert "ready" not in output.split()
    assert_nothing_is_left(directory)


def test_what_is_no_directory_is_named(tmp_path: Path) -> None:
    """One line with the path and what to do; no number of an error."""
    file = tmp_path / "file"
    file.write_text("mine")
    done = subprocess.run([*DEMO, "--dir", str(file)], capture_output=True, text=True, timeout=LONG, check=False)
    expected = (
        f"error: the demo cannot use {file} .it is no directory.: give --dir a directory that you alone may write"
    )
    assert 2 == done.returncode
    assert re.match(expected, done.stderr)
    assert "mine" == file.read_text()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_directory_that_others_may_write_is_refused(mode: int, tmp_path: Path) -> None:
    """It would hold private keys and the policy. Nothing is put into it; the remedy is said."""
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(mode)
    expected = (
        f"error: the demo cannot use {directory} (others may write to it, its mode is {mode:04o}): give --dir a"
        " directory that you alone may write, or a new one\n"
    )
    done = subprocess.run([*DEMO, "--dir", str(directory)], capture_output=True, text=True, timeout=LONG, check=False)
    assert (2, expected) == (done.returncode, done.stderr)
    assert [] == list(directory.iterdir())


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_in_place_of_the_directory_is_refused(*, exists: bool, tmp_path: Path) -> None:
    """Whoever made it chose where the keys go. Where it leads to is left alone."""
    target, link = tmp_path / "target", tmp_path / "link"
    if exists:
        target.mkdir(mode=0o700)
    link.symlink_to(target)
    expected = (
        f"error: the demo cannot use {link} (it is a symbolic link): give --dir a directory that you alone may write,"
        " or a new one\n"
    )
    done = subprocess.run([*DEMO, "--dir", str(link)], capture_output=True, text=True, timeout=LONG, check=False)
    assert (2, expected) == (done.returncode, done.stderr)
    assert [] == (list(target.iterdir()) if exists else [])
    assert exists == target.exists()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    """What it leads to is not made."""
    directory = tmp_path / "demo"
    directory.mkdir(mode=0o700)
    (directory / ".lock").symlink_to(tmp_path / "elsewhere")
    done = subprocess.run([*DEMO, "--dir", str(directory)], capture_output=True, text=True, timeout=LONG, check=False)
    assert 2 == done.returncode
    assert f"error: the demo cannot use {directory} (" in done.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_a_demo_that_is_killed_leaves_nothing_running(tmp_path: Path) -> None:
    """SIGKILL gives it no time to tidy up: the broker, the service and OpenBao end with it all the same."""
    directory = tmp_path / "demo"
    with demo(directory) as process:
        wait_for_line(process, "ready")
        assert 4 <= len(processes_of(directory))
        process.kill()
        process.wait(LONG)
        assert_nothing_is_left(directory)
