"""What one durable audit record costs in CPU: the first caller writes for its group, or a thread that only writes.

``python tests/bench/group_write.py`` prints the median of five rounds in microseconds of this process's CPU for each
record, beside the work that a call does anyway (one ES256 signature and some Python).
"""

from __future__ import annotations

import contextlib
import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from carnet_broker.edges.ledger.group_writer import GroupWriter

LINE: Final = b"x" * 420 + b"\n"
KEY: Final = ec.generate_private_key(ec.SECP256R1())
RECORDS: Final = 2000
ROUNDS: Final = 5


def nothing(_: int) -> Callable[[], None]:
    """Record nothing: what the calls cost without."""
    return lambda: None


def first_caller(descriptor: int) -> Callable[[], None]:
    """The way that the broker goes."""

    def write(data: bytes, sync: bool) -> None:
        os.write(descriptor, data)
        if sync:
            os.fdatasync(descriptor)

    writer = GroupWriter(write, deadline=timedelta(seconds=30), mono=time.monotonic)
    return lambda: writer.commit(LINE, sync=True)


def writing_thread(descriptor: int) -> Callable[[], None]:
    """A thread takes records off a queue, and writes all that are there."""
    waiting: queue.SimpleQueue[threading.Lock] = queue.SimpleQueue()

    def run() -> None:
        while True:
            group = [waiting.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    group.append(waiting.get_nowait())
            os.write(descriptor, LINE * len(group))
            os.fdatasync(descriptor)
            for done in group:
                done.release()

    threading.Thread(target=run, daemon=True).start()

    def commit() -> None:
        done = threading.Lock()
        done.acquire()
        waiting.put(done)
        done.acquire()

    return commit


def cost(way: Callable[[int], Callable[[], None]], threads: int) -> float:
    """Return the microseconds of CPU for each record, with so many callers at once."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        descriptor = os.open(Path(directory) / "file", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        commit = way(descriptor)

        def call() -> None:
            for _ in range(RECORDS // threads):
                KEY.sign(LINE, ec.ECDSA(hashes.SHA256()))
                sum(range(2500))
                commit()

        callers = [threading.Thread(target=call) for _ in range(threads)]
        started = time.process_time()
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        spent = time.process_time() - started
        os.close(descriptor)
    return spent / RECORDS * 1e6


def main() -> None:
    """Measure all ways in turns, so that a noisy moment hits each of them."""
    for threads in (1, 4, 16):
        spent: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for way in (nothing, first_caller, writing_thread):
                spent.setdefault(way.__name__, []).append(cost(way, threads))
        figures = ", ".join(f"{name} {statistics.median(values):.0f} us" for name, values in spent.items())
        print(f"{threads:2} callers: {figures}")


if __name__ == "__main__":
    main()
