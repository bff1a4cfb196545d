"""The mirror of the keyring document in the database."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import select

from carnet_broker.core.mirror import MirrorSignature
from carnet_broker.edges.store.database import UNAVAILABLE, Database, nonsense
from carnet_broker.edges.store.tables import ONLY_ROW, keyring_mirror
from carnet_broker.ports import MirroredKeyring, StoreUnavailableError

__all__ = ["StoredMirror"]


class StoredMirror:
    """`ports.KeyringMirror`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def save(self, generation: int, content: dict[str, Any], signature: MirrorSignature | None) -> None:
        """Keep `content`, unless a later generation is there. What is there already is not written again."""
        values: dict[str, Any] = {
            "generation": generation,
            "content": json.dumps(content, sort_keys=True),
            "signed_by": None if signature is None else signature.kid,
            "signature": None if signature is None else signature.signature,
        }
        with self._database.write() as transaction:
            there = transaction.connection.execute(select(keyring_mirror)).mappings().first()
            if there is not None and values.items() <= dict(there).items():
                return
            values["saved_at"] = transaction.now()
            transaction.connection.execute(
                transaction.insert(keyring_mirror)
                .values(id=ONLY_ROW, **values)
                .on_conflict_do_update(
                    index_elements=[keyring_mirror.c.id],
                    set_=values,
                    where=keyring_mirror.c.generation <= generation,
                )
            )
            transaction.changed = True

    def load(self) -> MirroredKeyring | None:
        """Return what was saved last, None where nothing was."""
        with self._database.read() as transaction:
            row = transaction.connection.execute(select(keyring_mirror)).first()
            now = transaction.now()
        if row is None:
            return None
        try:
            content = json.loads(row.content)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise StoreUnavailableError(UNAVAILABLE) from nonsense("a keyring")
        signed = row.signed_by is not None and row.signature is not None
        return MirroredKeyring(
            generation=row.generation,
            content=content,
            saved_at=row.saved_at,
            read_at=now,
            signature=MirrorSignature(row.signed_by, bytes(row.signature)) if signed else None,
        )
