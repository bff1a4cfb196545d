"""Processes that end with the one that started them, however it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

__all__ = ["ending_with_us"]

# Runs between fork and exec: asks the kernel to kill the process when the thread that started it is gone
# (prctl(2), PR_SET_PDEATHSIG = 1, kept across exec). A program of its own, because a `preexec_fn` may deadlock in a
# process that has threads.
_DIE_WITH_PARENT: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def ending_with_us(command: Sequence[str]) -> list[str]:
    """Return a command that runs `command`, an absolute path and its arguments, and is killed when we end. Linux only.

    It is to be started by a thread that lives as long as the process is wanted: that thread's end kills it, too.
    """
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
