"""Where a SQLite store may be: in a directory, and in files, that are the broker's alone.

Whoever can write there can take revocations away, or put keys into the copy of the keyring. A link is refused, for the
directory as well as for the file: it may be turned to another place by whoever owns the directory that it is in.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from carnet.errors import ConfigError

__all__ = ["check_place", "make_file"]

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_BESIDE: Final = ("", "-wal", "-shm", "-journal")
"""What SQLite adds to the name of the file for those that it keeps beside it."""


def check_place(path: Path) -> None:
    """Refuse a directory, or a file of the store at `path`, that is not the broker's alone. Raises `ConfigError`.

    What is missing is fine: making it says why it cannot be.
    """
    _check(
        path.parent, stat.S_ISDIR, "directory", "give the store a directory of its own (mkdir -m 700), or chmod go-w"
    )
    for suffix in _BESIDE:
        file = path.with_name(path.name + suffix)
        _check(file, stat.S_ISREG, "file", "make sure that nobody else has written to it, then chmod 600")


def make_file(path: Path) -> None:
    """Make the file, for its owner alone; SQLite gives the same rights to the files that it keeps beside it.

    Raises `ConfigError` where it cannot be made, or where its place is not the broker's alone.
    """
    check_place(path)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_mode & 0o077:
                os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        msg = f"store.url: cannot use {path}: {error.strerror}; give a file in a directory that the broker may write"
        raise ConfigError(msg) from error


def _check(path: Path, is_kind: Callable[[int], bool], kind: str, remedy: str) -> None:
    try:
        status = path.lstat()
    except OSError:
        return
    if stat.S_ISLNK(status.st_mode):
        msg = f"store.url: {path} is a link: name the {kind} that it leads to ({path.resolve()})"
        raise ConfigError(msg)
    if not is_kind(status.st_mode):
        msg = f"store.url: {path} is no {kind}: name another"
        raise ConfigError(msg)
    if status.st_uid != os.geteuid():
        msg = (
            f"store.url: the {kind} {path} belongs to user {status.st_uid}, and this broker is user {os.geteuid()}:"
            " chown it, or name another"
        )
        raise ConfigError(msg)
    if status.st_mode & _OTHERS_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        msg = f"store.url: others may write to the {kind} {path} (mode {mode:04o}): {remedy}"
        raise ConfigError(msg)
