"""Keeps the background threads of a verifier outside of gRPC while the process forks.

With ``GRPC_ENABLE_FORK_SUPPORT=1`` gRPC makes its own threads wait before a fork, but not those that call it, and its
core leaves out its own preparation when one of them is inside: the child is then stuck. An open stream also held up the
fork, until its next message. So each such thread stands behind a `Gate`, which is closed for the time of a fork.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

__all__ = ["Gate", "prepare_for_forks"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_PATIENCE: Final = 1.0
"""Seconds for which a fork waits for all threads to be outside."""


class Gate:
    """What one thread passes to call gRPC."""

    def __init__(self, interrupt: Callable[[], object] | None = None) -> None:
        """`interrupt` makes the thread leave soon; it must not wait."""
        self._interrupt = interrupt
        self._open = threading.Event()
        self._open.set()
        self._inside = threading.Lock()
        with _forks.lock:
            _forks.gates.add(self)

    @property
    def closing(self) -> bool:
        """Whether a fork waits for the thread to leave."""
        return not self._open.is_set()

    def run(self, step: Callable[_Arguments, _Result], *args: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        """Wait while the process forks, then call `step` and return what it returns."""
        self._open.wait()
        with self._inside:
            return step(*args, **named)

    def close(self) -> None:
        """Let nobody in, and ask who is inside to leave."""
        self._open.clear()
        if self._interrupt is not None:
            self._interrupt()

    def empty_by(self, end: float) -> bool:
        """Say whether nobody is inside by `end` on the monotonic clock; then nobody is until `reopen`."""
        return self._inside.acquire(timeout=max(0.0, end - time.monotonic()))

    def reopen(self, *, empty: bool) -> None:
        """Let the thread in again. `empty` is what `empty_by` said."""
        if empty:
            self._inside.release()
        self._open.set()


class _Forks:
    """The gates of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # Held while the process forks.
        self.gates: weakref.WeakSet[Gate] = weakref.WeakSet()
        self.closed: list[tuple[Gate, bool]] = []
        self.registered = False

    def before(self) -> None:
        self.lock.acquire()
        gates = list(self.gates)
        for gate in gates:
            gate.close()
        end = time.monotonic() + _PATIENCE
        self.closed = [(gate, gate.empty_by(end)) for gate in gates]

    def after_in_parent(self) -> None:
        closed, self.closed = self.closed, []
        for gate, empty in closed:
            gate.reopen(empty=empty)
        self.lock.release()

    def after_in_child(self) -> None:
        self.gates, self.closed = weakref.WeakSet(), []  # Their threads are not in this process.
        self.lock.release()


_forks: Final = _Forks()


def prepare_for_forks() -> None:
    """Close the gates at each fork from now on. Call it after gRPC made a channel.

    The hook that is registered last runs first, and gRPC registers its own with the first channel: it then waits for
    threads that this one has sent outside.
    """
    with _forks.lock:
        if not _forks.registered:
            _forks.registered = True
            os.register_at_fork(
                before=_forks.before,
                after_in_parent=_forks.after_in_parent,
                after_in_child=_forks.after_in_child,
            )
