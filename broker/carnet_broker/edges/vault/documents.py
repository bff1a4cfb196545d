"""The keyring document in KV: one entry, replaced with check-and-set.

The document is kept as one JSON text in the member ``document``. OpenBao refuses a request of more than 1,000 JSON
strings, names included, which a keyring of thirty keys would come to; a text is one.
"""

from __future__ import annotations

import json
import threading
from typing import Any, Final, NoReturn

from carnet_broker.edges.vault.kv import KvEntry, KvMount
from carnet_broker.edges.vault.session import VaultSession
from carnet_broker.ports import KeyStoreUnavailableError, VersionedDocument

__all__ = ["KEYRING", "VaultKeyringDocument", "content_of_entry"]

KEYRING: Final = "keyring"
_WHAT: Final = "the keyring document"
_MEMBER: Final = "document"


def content_of_entry(session: VaultSession, entry: KvEntry) -> dict[str, Any]:
    """Return the document in `entry`, or raise `KeyStoreUnavailableError`."""
    content: Any = None
    if entry.data is not None and entry.data.keys() == {_MEMBER} and isinstance(entry.data[_MEMBER], str):
        try:
            content = json.loads(entry.data[_MEMBER])
        except (ValueError, RecursionError):
            content = None
    if not isinstance(content, dict):
        session.senseless(f"read {_WHAT}", "it is not a keyring that a broker wrote")
    return content


class VaultKeyringDocument:
    """The document at ``keyring``. Thread-safe."""

    def __init__(self, session: VaultSession) -> None:
        self._session = session
        self._kv = KvMount(session)
        self._lock = threading.Lock()
        self._newest = 0

    def load(self) -> VersionedDocument | None:
        """Return the current document, None where the bootstrap prepared its place and nobody has written it.

        A document that was deleted or destroyed, whose metadata were wiped, or whose version went back is not "none
        yet": that raises `KeyStoreUnavailableError`, as does everything else that keeps us from reading it.
        """
        # The floor is taken before the reading: another thread may see a newer version meanwhile.
        floor = self._newest
        entry = self._kv.read(KEYRING, _WHAT)
        if entry is None and floor == 0:
            if self._kv.is_prepared(KEYRING, _WHAT):
                return None
            entry = self._kv.read(KEYRING, _WHAT)  # It may have been written between the two looks.
        if entry is None:
            why = "its place is not prepared: run the bootstrap" if floor == 0 else "its metadata were wiped"
            self._gone(why)
        if entry.data is None:
            self._gone(f"version {entry.version} was deleted: undelete it, or write the last good one again")
        if entry.version < floor:
            self._gone(f"it is version {entry.version}, and {floor} was seen before: it was rolled back")
        self._saw(entry.version)
        return VersionedDocument(content_of_entry(self._session, entry), entry.version)

    def replace(self, content: dict[str, Any], *, expected_version: int) -> int:
        """Write the document if its version is still `expected_version` (0: there is none); return the new version.

        Raises `DocumentConflictError` or `KeyStoreUnavailableError`. After the latter it is not known whether the
        write happened: load again.
        """
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
        version = self._kv.write(KEYRING, _WHAT, {_MEMBER: text}, expected_version=expected_version)
        self._saw(version)
        return version

    def _saw(self, version: int) -> None:
        with self._lock:
            self._newest = max(self._newest, version)

    def _gone(self, why: str) -> NoReturn:
        msg = f"Vault at {self._session.settings.address}: {_WHAT} cannot be used: {why}"
        raise KeyStoreUnavailableError(msg)
