"""The thread that waits for the disk, and that nobody has to wait for.

A thread that hangs in a sync cannot be called back. Those of `ThreadPoolExecutor` are waited for when the interpreter
ends, so one of them would keep the process from ending until the disk answers, which may be never.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

__all__ = ["DiskThread"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class DiskThread(Executor):
    """Runs what is submitted, one after the other, in one daemon thread."""

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(
        self, fn: Callable[_Arguments, _Result], /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Result]:
        """Run `fn` after all that was submitted before. Raises `RuntimeError` after `close`."""
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            # Whatever it raises is for who waits for it; the thread serves the next one.
            except BaseException as error:  # noqa: BLE001
                future.set_exception(error)

        with self._lock:
            if self._closed:
                msg = "the thread takes nothing more: it was closed"
                raise RuntimeError(msg)
            self._work.put(work)
        return future

    def close(self, *, within: float) -> bool:
        """Take no more, and wait `within` seconds for what was submitted; say whether all of it is done."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._work.put(None)
        self._thread.join(within)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
