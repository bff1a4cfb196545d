"""A process that a test starts and speaks to in lines of JSON: one line asks, one line answers.

The child calls `serve_lines` with what answers. Both read CLOCK_MONOTONIC, which is one clock for all processes of a
host, so that times of one can be compared with those of the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

import psutil  # type: ignore[import-untyped]

__all__ = ["Child", "child", "serve_lines"]

_LIMIT: Final = 4 * 1024 * 1024
_ENDS_WITHIN: Final = 15.0


class Child:
    """The parent's end. Made by `child`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._asking = threading.Lock()
        self._thread = ThreadPoolExecutor(1)

    def ask(self, **question: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON
        """Ask, and wait for the answer."""
        with self._asking:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        assert line, f"the child ended: {self._process.wait(_ENDS_WITHIN)}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def begin(self, **question: Any) -> Future[dict[str, Any]]:  # noqa: ANN401 - any JSON
        """Ask, and let the answer come."""
        return self._thread.submit(self.ask, **question)

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait(_ENDS_WITHIN)

    def cpu_seconds(self) -> float:
        """Return how much CPU time the process has used so far."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def child(
    module: str,
    *,
    paths: Sequence[str] = (),
    **settings: Any,  # noqa: ANN401 - any JSON
) -> Iterator[Child]:
    """Run ``python -m module`` with `settings` for the length of the block; `paths` come first on its path."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *sys.path])},
    )
    try:
        yield Child(process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


async def serve_lines(answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> None:
    """Answer each line of standard input, in their order, until it ends."""
    reader = asyncio.StreamReader(limit=_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        print(json.dumps(await answer(json.loads(line))), flush=True)
