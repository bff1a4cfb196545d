"""What a verifier knows, in a file: so that a service that restarts while every broker is down can verify at once.

- The directory must belong to the user of the process and be open to nobody else: whoever writes there chooses whom
  the service believes. One file for each issuer and audience, readable by its owner only.
- A file is replaced whole: written beside, flushed to the disk, renamed. It has a checksum against half a file, not
  against an intruder.
- Several processes may write the same file. The last one wins, but within an epoch no position goes back.
- How old the file is, is told by the wall clock, and within one run of the machine by the time since its start as well;
  the greater counts. A file from the future (the clock was set back) counts as too old.

The first line of a file is a JSON object: what it is of, the position, the times, and the checksum of the rest. The
second is the key set; each further line is one revocation.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from carnet.encoding import decode_json_object
from carnet.errors import ConfigError, InvalidKeySetError, InvalidRevocationError
from carnet.identity import StrPath
from carnet.jwk import KeySet
from carnet.revocations import Position, Revocation, RevocationKind, check_entry
from carnet.trust_state import SavedTrust

__all__ = ["StateFile", "StateFileError", "StateKeeper"]

_log: Final = logging.getLogger("carnet.trust")

_FORMAT: Final = 1
_MAX_BYTES: Final = 512 * 1024 * 1024
_MAX_HEAD: Final = 4096
_HEAD_MEMBERS: Final = frozenset(
    {
        "format",
        "issuer",
        "audience",
        "epoch",
        "generation",
        "revocation_version",
        "revocation_digest",
        "max_age_ms",
        "known_at_ms",
        "boot",
        "known_at_uptime_ms",
        "sha256",
    }
)
_MILLISECOND: Final = timedelta(milliseconds=1)
_EPOCH_START: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND: Final = timedelta(seconds=1)
_PRIVATE: Final = 0o077
_ENTRY_PARTS: Final = 5
_SHORTEST_PAUSE: Final = 0.1
_LAST_WAITS: Final = 5.0
"""Seconds; what was revoked a moment before the end must be known at the next start."""


class StateFileError(Exception):
    """A file that is not used: it does not say what it should. Nothing breaks for it."""


@dataclass(frozen=True, slots=True)
class _Head:
    position: Position
    max_age: timedelta
    known_at: datetime
    boot: str
    known_at_uptime: timedelta
    checksum: str


class StateFile:
    """The file of one issuer and audience in a directory. Raises `ConfigError` for a directory that is not safe."""

    def __init__(self, directory: StrPath, *, issuer: str, audience: str) -> None:
        self._directory = Path(directory)
        self._issuer = issuer
        self._audience = audience
        name = hashlib.sha256(f"{issuer}\n{audience}".encode()).hexdigest()[:32]
        self._name = f"trust-{name}"
        try:
            self._directory.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError as error:
            msg = f"state directory {self._directory} cannot be made ({error.strerror}): name another"
            raise ConfigError(msg) from error
        os.close(self._open_directory())

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._directory / self._name

    def load(self, *, wall: datetime, max_age: timedelta) -> SavedTrust | None:
        """Return what the file holds, None where there is none. `wall` is aware UTC.

        Raises `StateFileError` for one that cannot be used: damaged, of somebody else, or older than `max_age`.
        """
        directory = self._open_directory()
        try:
            raw = self._read(directory)  # Needs no lock: a file is replaced whole.
        except FileNotFoundError:
            return None
        except OSError as error:
            msg = f"{self.path} cannot be read: {error.strerror}"
            raise StateFileError(msg) from error
        finally:
            os.close(directory)
        head_line, newline, body = raw.partition(b"\n")
        head = self._parse_head(head_line)
        if not newline or hashlib.sha256(body).hexdigest() != head.checksum:
            msg = f"{self.path} is damaged: its checksum is another"
            raise StateFileError(msg)
        age = _age(head, wall)
        if age is None or age > max_age:
            msg = f"{self.path} is of {head.known_at:%Y-%m-%dT%H:%M:%SZ}, which is too old, or in the future"
            raise StateFileError(msg)
        lines = body.split(b"\n")
        try:
            keys = KeySet.parse(lines[0])
            entries = tuple(_parse_entry(line) for line in lines[1:] if line)
        except (InvalidKeySetError, InvalidRevocationError, ValueError) as error:
            msg = f"{self.path} holds what cannot be: {error}"
            raise StateFileError(msg) from error
        return SavedTrust(head.position, keys, head.max_age, entries, age)

    def save(self, trust: SavedTrust, *, wall: datetime) -> bool:
        """Write `trust`, as it is at `wall`, unless the file knows more; say whether it was written.

        Raises `OSError` where it cannot be; `BlockingIOError` while another process writes.
        """
        body = "\n".join([trust.keys.to_json(), *map(_format_entry, trust.entries), ""]).encode("ascii")
        known_at = wall - trust.age
        position = trust.position
        head = {
            "format": _FORMAT,
            "issuer": self._issuer,
            "audience": self._audience,
            "epoch": position.epoch,
            "generation": position.generation,
            "revocation_version": position.revocation_version,
            "revocation_digest": position.revocation_digest.hex(),
            "max_age_ms": trust.max_age // _MILLISECOND,
            "known_at_ms": (known_at - _EPOCH_START) // _MILLISECOND,
            "boot": _boot(),
            "known_at_uptime_ms": (_uptime() - trust.age) // _MILLISECOND,
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        raw = json.dumps(head, separators=(",", ":")).encode("ascii") + b"\n" + body
        with self._locked() as directory:
            if self._knows_more(directory, position, known_at, wall):
                return False
            self._replace(directory, raw)
        return True

    def _knows_more(self, directory: int, position: Position, known_at: datetime, wall: datetime) -> bool:
        try:
            there = self._parse_head(self._read(directory, _MAX_HEAD).partition(b"\n")[0])
        except (OSError, StateFileError):
            return False
        old = there.position
        if old.epoch != position.epoch:
            return old.epoch > position.epoch
        if old.generation > position.generation or old.revocation_version > position.revocation_version:
            return True
        same = (old.generation, old.revocation_version) == (position.generation, position.revocation_version)
        return same and known_at <= there.known_at <= wall

    def _replace(self, directory: int, raw: bytes) -> None:
        beside = f"{self._name}.{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(beside, flags, 0o600, dir_fd=directory), "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.rename(beside, self._name, src_dir_fd=directory, dst_dir_fd=directory)
            os.fsync(directory)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(beside, dir_fd=directory)
            raise

    def _read(self, directory: int, most: int = _MAX_BYTES) -> bytes:
        descriptor = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & _PRIVATE:
                msg = f"{self.path} is not a file of this user that nobody else may open"
                raise StateFileError(msg)
            if status.st_size > _MAX_BYTES:
                msg = f"{self.path} is larger than {_MAX_BYTES} bytes"
                raise StateFileError(msg)
            return file.read(most)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Keep other processes out; yield a descriptor of the directory, checked again."""
        directory = self._open_directory()
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # A process that was stopped must hold up nobody.
            yield directory
        finally:
            os.close(directory)  # Which lets go of the lock.

    def _open_directory(self) -> int:
        try:
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            msg = f"state directory {self._directory} cannot be opened ({error.strerror}): name a directory of your own"
            raise ConfigError(msg) from error
        status = os.fstat(directory)
        if status.st_uid != os.geteuid() or status.st_mode & _PRIVATE:
            os.close(directory)
            msg = (
                f"state directory {self._directory} belongs to user {status.st_uid} with mode"
                f" {stat.S_IMODE(status.st_mode):o}: it must belong to user {os.geteuid()} alone, run"
                f" chmod 700 {self._directory}, or name another"
            )
            raise ConfigError(msg)
        return directory

    def _parse_head(self, line: bytes) -> _Head:
        try:
            head = decode_json_object(line, max_containers=1)
            if head.keys() != _HEAD_MEMBERS or head["format"] != _FORMAT:
                msg = "its members are others"
                raise ValueError(msg)  # noqa: TRY301 - one way out for all that is wrong
            if (head["issuer"], head["audience"]) != (self._issuer, self._audience):
                msg = "it is of another issuer or audience"
                raise ValueError(msg)  # noqa: TRY301 - as above
            return _Head(
                Position(
                    _whole(head, "epoch"),
                    _whole(head, "generation"),
                    _whole(head, "revocation_version"),
                    _digest(head["revocation_digest"]),
                ),
                timedelta(milliseconds=_whole(head, "max_age_ms")),
                _EPOCH_START + timedelta(milliseconds=_whole(head, "known_at_ms")),
                _text(head, "boot"),
                timedelta(milliseconds=_whole(head, "known_at_uptime_ms", least=-(2**53))),
                _text(head, "sha256"),
            )
        except (ValueError, OverflowError) as error:
            msg = f"{self.path} cannot be used: {error}"
            raise StateFileError(msg) from error


class StateKeeper:
    """Says when the file is to be written, and writes it: at a new position at once, else now and then. Thread-safe."""

    def __init__(self, file: StateFile, *, every: timedelta) -> None:
        self._file = file
        self._every = every.total_seconds()
        self._lock = threading.Lock()
        self._position: Position | None = None
        self._next = 0.0  # Monotonic seconds: not before, whatever there is.
        self._next_alike = 0.0  # Not before where the position is the same.
        self._failed = False

    def is_due(self, position: Position | None, *, last: bool = False) -> bool:
        """Say whether what is known up to `position` is to be written now; `last`: whether it is now or never."""
        if position is None:
            return False
        if position != self._position:
            return last or time.monotonic() >= self._next
        return time.monotonic() >= self._next_alike

    def write(self, trust: SavedTrust, *, wall: datetime, last: bool = False) -> None:
        """Write the file. One that cannot be written is said once, and tried again.

        While another write is under way nothing is written, unless this is the `last`: then it waits for the other.
        """
        if not self._lock.acquire(timeout=_LAST_WAITS if last else 0):
            return
        try:
            begin = time.monotonic()
            try:
                self._file.save(trust, wall=wall)
            except BlockingIOError:
                return
            except (ConfigError, OSError) as error:
                if not self._failed:
                    _log.warning("what is known cannot be kept for the next start: %s", error)
                self._failed = True
            else:
                self._failed = False
            end = time.monotonic()
            self._position = trust.position
            # A large file takes long; it gets a twentieth of the time.
            self._next = end + max(_SHORTEST_PAUSE, 20 * (end - begin))
            self._next_alike = max(self._next, end + self._every)
        finally:
            self._lock.release()


def _age(head: _Head, wall: datetime) -> timedelta | None:
    """Return how old the file is, None where that cannot be told."""
    by_wall = wall - head.known_at
    if by_wall < timedelta():
        return None
    # The time since the start of the machine goes on while it sleeps, and nobody sets it.
    return max(by_wall, _uptime() - head.known_at_uptime) if head.boot == _boot() else by_wall


def _boot() -> str:
    """Return what names this run of the machine, empty where nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _uptime() -> timedelta:
    return timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME))


def _format_entry(entry: Revocation) -> str:
    ends = None if entry.expires_at is None else (entry.expires_at - _EPOCH_START) // _SECOND
    return json.dumps([entry.version, entry.kind, entry.value, entry.before_version, ends], separators=(",", ":"))


def _parse_entry(line: bytes) -> Revocation:
    parts = json.loads(line)
    if not isinstance(parts, list) or len(parts) != _ENTRY_PARTS:
        msg = "a line is no revocation"
        raise ValueError(msg)
    version, kind, value, before_version, ends = parts
    numbers = [version, before_version, *([] if ends is None else [ends])]
    if not isinstance(value, str) or any(type(number) is not int for number in numbers):
        msg = "a revocation has a part of another kind"
        raise ValueError(msg)
    try:
        expires_at = None if ends is None else _EPOCH_START + timedelta(seconds=ends)
    except OverflowError as error:
        msg = "a revocation ends at a time that cannot be"
        raise ValueError(msg) from error
    entry = Revocation(version, RevocationKind(kind), value, before_version, expires_at)
    check_entry(entry)
    return entry


def _whole(head: dict[str, Any], name: str, *, least: int = 0) -> int:
    number = head[name]
    if type(number) is not int or not least <= number <= 2**53:
        msg = f"{name} is no number that it could be"
        raise ValueError(msg)
    return number


def _text(head: dict[str, Any], name: str) -> str:
    text = head[name]
    if not isinstance(text, str):
        msg = f"{name} is no text"
        raise ValueError(msg)  # noqa: TRY004 - a wrong file, not a wrong call
    return text


def _digest(text: object) -> bytes:
    if not isinstance(text, str) or len(text) != 64:  # noqa: PLR2004 - 32 bytes in hex
        msg = "revocation_digest is no digest"
        raise ValueError(msg)
    return bytes.fromhex(text)
