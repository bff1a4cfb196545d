"""The thread that waits for the disk: everything in order, and nobody waits for it for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from carnet_broker.disk_thread import DiskThread


def test_what_is_submitted_runs_in_order_in_one_thread():
    """And `close` waits for all of it; after that nothing is taken. Twice is once."""
    thread = DiskThread("disk")
    done = [thread.submit(lambda n: (n, threading.current_thread().name), number) for number in range(50)]
    assert thread.close(within=10)
    assert [(number, "disk") for number in range(50)] == [each.result(0) for each in done]
    assert thread.close(within=0)
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit(int)


def test_what_fails_tells_who_waits_and_the_next_is_done():
    """One failed write is not the end of the thread."""
    thread = DiskThread("disk")
    failed, fine = thread.submit(int, "x"), thread.submit(int, "1")
    with pytest.raises(ValueError, match="invalid literal"):
        failed.result(10)
    assert 1 == fine.result(10)
    assert thread.close(within=10)


def test_what_was_given_up_before_it_began_is_left_out():
    """As with any other executor."""
    thread, go = DiskThread("disk"), threading.Event()
    thread.submit(go.wait, 10)
    given_up = thread.submit(int)
    assert given_up.cancel()
    go.set()
    assert thread.close(within=10)


def test_b14_close_says_that_a_disk_hangs_in_time():
    """It waits as long as it is told; once the disk answers, the thread ends by itself."""
    thread, go = DiskThread("disk"), threading.Event()
    thread.submit(go.wait, 30)
    began = time.monotonic()
    assert not thread.close(within=0.2)
    assert 0.19 < time.monotonic() - began < 5
    go.set()
    assert thread.close(within=10)


def test_b14_a_disk_that_hangs_does_not_keep_a_process_from_ending():
    """The interpreter waits for the threads of a `ThreadPoolExecutor`, and not for this one."""
    code = (
        "import time; from carnet_broker.disk_thread import DiskThread; DiskThread('disk').submit(time.sleep, 60);"
        "print('over')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert "over\n" == done.stdout
