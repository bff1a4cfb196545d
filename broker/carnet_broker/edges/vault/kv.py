"""The part of KV version 2 that Carnet uses, read strictly: entries with versions, check-and-set, lists.

KV has two paths for one entry: ``data/`` is its content by version, ``metadata/`` the entry as such. Deleting a
version leaves the entry, and its number is never used again; deleting the metadata leaves nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from carnet_broker.edges.vault.failures import CONFLICT, has_phrase
from carnet_broker.edges.vault.session import Reply, VaultSession
from carnet_broker.ports import DocumentConflictError

__all__ = ["MAX_LIST_BYTES", "KvEntry", "KvMount", "first_names"]

_NO_CONTENT: Final = 204
_BAD_REQUEST: Final = 400
_NOT_FOUND: Final = 404
_MAX_BYTES: Final = 1024 * 1024
MAX_LIST_BYTES: Final = 8 * 1024 * 1024
"""Some 200,000 names."""
_NAMES_BEGIN: Final = re.compile(rb'"keys"\s*:\s*\[')
_NAME: Final = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*,')
_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")


@dataclass(frozen=True, slots=True)
class KvEntry:
    """The newest version of an entry."""

    version: int
    created_at: datetime
    """When this version was written, by Vault's clock; aware UTC."""
    data: dict[str, Any] | None = field(repr=False)
    """The content; None where this version was deleted or destroyed."""


class KvMount:
    """The entries of one environment. Thread-safe."""

    def __init__(self, session: VaultSession) -> None:
        self._session = session
        self._mount = session.settings.kv_mount
        self._environment = session.settings.environment

    def read(self, name: str, what: str, *, max_bytes: int = _MAX_BYTES) -> KvEntry | None:
        """Return the newest version of ``ENVIRONMENT/name``, None where there is no such entry. Raises as `call`.

        An entry that has metadata and no version yet counts as none.
        """
        operation = f"read {what}"
        path = self._path("data", name)
        reply = self._session.call(operation, "GET", path, accept=(_NOT_FOUND,), max_bytes=max_bytes)
        data = reply.body.get("data")
        if reply.status == _NOT_FOUND and data is None:
            self._check_not_found(operation, path, reply)
            return None
        metadata = data.get("metadata") if isinstance(data, dict) else None
        content = data.get("data") if isinstance(data, dict) else None
        version = metadata.get("version") if isinstance(metadata, dict) else None
        created_at = parse_time(metadata.get("created_time")) if isinstance(metadata, dict) else None
        readable = content is None if reply.status == _NOT_FOUND else isinstance(content, dict)
        if type(version) is not int or version < 1 or created_at is None or not readable:
            self._session.senseless(operation, "it is no version of a KV entry")
        return KvEntry(version, created_at, content)

    def is_prepared(self, name: str, what: str) -> bool:
        """Say whether the entry has metadata that require check-and-set, and no version yet. Raises as `call`."""
        operation = f"read the metadata of {what}"
        path = self._path("metadata", name)
        reply = self._session.call(operation, "GET", path, accept=(_NOT_FOUND,))
        data = reply.body.get("data")
        if reply.status == _NOT_FOUND:
            self._check_not_found(operation, path, reply)
            return False
        if not isinstance(data, dict) or type(data.get("current_version")) is not int:
            self._session.senseless(operation, "it is no metadata of a KV entry")
        return data.get("cas_required") is True and data["current_version"] == 0

    def write(self, name: str, what: str, data: dict[str, Any], *, expected_version: int) -> int:
        """Write the next version if the newest is `expected_version` (0: there is none), and return its number.

        Raises `DocumentConflictError` if it is not, or as `call`.
        """
        operation = f"write {what}"
        body = {"data": data, "options": {"cas": expected_version}}
        path = self._path("data", name)
        reply = self._session.call(operation, "POST", path, body, accept=(_BAD_REQUEST,))
        if reply.status == _BAD_REQUEST:
            if has_phrase(reply.body, CONFLICT):
                msg = f"{what} is no longer version {expected_version}: somebody else wrote it first"
                raise DocumentConflictError(msg)
            self._session.refused(operation, path, reply)
        written = reply.body.get("data")
        version = written.get("version") if isinstance(written, dict) else None
        if type(version) is not int or version != expected_version + 1:
            self._session.senseless(operation, "it does not name the next version")
        return version

    def destroy(self, name: str, what: str) -> None:
        """Delete the entry with all its versions for good. One that is not there is fine. Raises as `call`."""
        operation = f"destroy {what}"
        reply = self._session.call(operation, "DELETE", self._path("metadata", name))
        if reply.status != _NO_CONTENT:
            self._session.senseless(operation, "it does not say that it was done")

    def names(self, folder: str, what: str, *, max_bytes: int = MAX_LIST_BYTES) -> list[str]:
        """Return the names of the entries and folders (with ``/`` at the end) in `folder`. Raises as `call`."""
        operation = f"list {what}"
        path = self._path("metadata", folder)
        reply = self._session.call(operation, "LIST", path, accept=(_NOT_FOUND,), max_bytes=max_bytes)
        if reply.status == _NOT_FOUND:
            self._check_not_found(operation, path, reply)
            return []
        data = reply.body.get("data")
        names = data.get("keys") if isinstance(data, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._session.senseless(operation, "it is no list of names")
        return names

    def _check_not_found(self, operation: str, path: str, reply: Reply) -> None:
        """Raise unless KV itself says that there is nothing: it gives no reason then.

        A mount that is gone, a wrong namespace or a proxy answer 404 too. To take that for "the key is lost" would
        make the broker give up its keys.
        """
        if reply.body.get("errors") != []:
            self._session.refused(operation, path, reply)

    def _path(self, kind: str, name: str) -> str:
        return f"{self._mount}/{kind}/{self._environment}/{name}"


def first_names(beginning: bytes) -> list[str]:
    """Return the names that the beginning of an answer to `KvMount.names` holds, which was too long to be read."""
    begin = _NAMES_BEGIN.search(beginning)
    position = begin.end() if begin is not None else len(beginning)
    names: list[str] = []
    while name := _NAME.match(beginning, position):
        try:
            names.append(json.loads(name[1]))
        except ValueError:
            break
        position = name.end()
    return names


def parse_time(text: object) -> datetime | None:
    """Return an RFC 3339 time as aware UTC, None if it is not one. Vault writes nanoseconds, which Python cannot."""
    found = _TIME.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        return None
    seconds, fraction, zone = found.groups()
    try:
        at = datetime.fromisoformat(f"{seconds}{(fraction or '.0')[:7]}{zone}")
    except ValueError:
        return None
    offset = at.utcoffset()
    return at if offset == timedelta(0) else None
