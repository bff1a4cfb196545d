"""The public keyring, kept in a file beside the audit record: so that a broker may start again while Vault is away.

What it serves then comes from the shared store, which more can write to than may bring keys. The kept keyring is what
vouches for that (`core.mirror`). It is not served, and not signed with.

- The file must be this user's and be writable by nobody else; otherwise it is as if there were none.
- A file that cannot be written is told of, and stops nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from carnet_broker.core.keyring import Keyring
from carnet_broker.core.keyring_document import InvalidKeyringError, keyring_of_content, keyring_to_content

__all__ = ["KeyringFile"]

_NAME: Final = "keyring.json"
_MAX_BYTES: Final = 1024 * 1024
_FLAGS: Final = os.O_NOFOLLOW | os.O_CLOEXEC


class KeyringFile:
    """Implements `ports.KeptKeyring` with one file."""

    def __init__(self, directory: Path, *, issuer: str, store_name: str, failed: Callable[[OSError], None]) -> None:
        """`failed` is told of each write that fails."""
        self._file = directory / _NAME
        self._issuer = issuer
        self._store_name = store_name
        self._failed = failed

    def keep(self, keyring: Keyring) -> None:
        """Write `keyring` in place of what is there, and flush it to the disk."""
        content = keyring_to_content(keyring, store=self._store_name)
        beside = self._file.with_name(f"{_NAME}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600), "w") as file:
                json.dump(content, file, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            self._failed(error)

    def load(self) -> Keyring | None:
        """Return what was kept, None where there is nothing that can be read and that others cannot have written."""
        try:
            with os.fdopen(os.open(self._file, os.O_RDONLY | os.O_NONBLOCK | _FLAGS), "rb") as file:
                found = os.fstat(file.fileno())
                others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or others_write:
                    return None
                content = json.loads(file.read(_MAX_BYTES))
            if not isinstance(content, dict):
                return None
            return keyring_of_content(content, issuer=self._issuer, store=self._store_name)
        except (OSError, ValueError, RecursionError, InvalidKeyringError):  # Half a file, or another one's.
            return None
