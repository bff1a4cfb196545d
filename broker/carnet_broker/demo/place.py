"""The directory of a demo, which belongs to one demo at a time, and to nobody but its user.

It holds private keys and the policy. Whoever else may write there could put a policy or a link in their place.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from carnet.errors import ConfigError

__all__ = ["occupied"]


@contextmanager
def occupied(directory: Path) -> Iterator[None]:
    """Hold `directory`, made if missing, for this demo alone. Raises `ConfigError` where that cannot be.

    The kernel lets go of the lock when this process ends, however it ends; the file stays.
    """
    folder = _opened(directory)
    try:
        descriptor = os.open(".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except OSError as error:
        raise _unusable(directory, error.strerror) from error
    finally:
        os.close(folder)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = f"another demo is using {directory}: end that one, or give another --dir"
            raise ConfigError(msg) from error
        yield
    finally:
        os.close(descriptor)


def _opened(directory: Path) -> int:
    """Return a descriptor of `directory`, made if missing. Raises `ConfigError` where others may write to it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if directory.is_symlink():
            raise _unusable(directory, "it is a symbolic link") from error
        why = "it is no directory" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise _unusable(directory, why) from error
    state = os.fstat(descriptor)
    if state.st_uid != os.geteuid():
        problem = "it belongs to another user"
    elif state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"others may write to it, its mode is {stat.S_IMODE(state.st_mode):04o}"
    else:
        return descriptor
    os.close(descriptor)
    raise _unusable(directory, problem)


def _unusable(directory: Path, why: str | None) -> ConfigError:
    return ConfigError(
        f"the demo cannot use {directory} ({why}): give --dir a directory that you alone may write, or a new one"
    )
