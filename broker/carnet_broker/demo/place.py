"""The directory of a demo, which belongs to one demo at a time."""

from __future__ import annotations

import fcntl
import os
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
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        why = "it is no directory" if isinstance(error, FileExistsError) else error.strerror
        msg = f"the demo cannot use {directory} ({why}): give --dir a directory that you may write, or a new one"
        raise ConfigError(msg) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = f"another demo is using {directory}: end that one, or give another --dir"
            raise ConfigError(msg) from error
        yield
    finally:
        os.close(descriptor)
