"""The contract of `ports.KeyringDocument`: one suite for the fake and for KV in a real OpenBao."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from carnet_broker.edges.vault import VaultKeyringDocument
from carnet_broker.ports import (
    DocumentConflictError,
    KeyringDocument,
    KeyStoreUnavailableError,
    VersionedDocument,
)
from support.fakes import FakeKeyringDocument
from support.vault import VaultPlace

Open = Callable[[], KeyringDocument]


@pytest.fixture(params=["fake", "vault"], name="open_document")
def _open_document(request: pytest.FixtureRequest) -> Open:
    """Opens the document as another replica has it."""
    if request.param == "fake":
        fake = FakeKeyringDocument()
        return lambda: fake
    place: VaultPlace = request.getfixturevalue("vault_place")
    return lambda: VaultKeyringDocument(place.session())


def test_there_is_none_yet(open_document: Open):
    """Before the first write there is no document, and that is not an error."""
    assert open_document().load() is None


def test_what_was_written_is_read(open_document: Open):
    """Each write makes the next version, and everybody reads the newest."""
    document = open_document()
    content: dict[str, Any] = {"issuer": "https://x", "keys": [{"a": [1, None, True]}], "text": "\u00e9\n\"'"}
    assert 1 == document.replace(content, expected_version=0)
    assert VersionedDocument(content, 1) == open_document().load()
    assert 2 == open_document().replace({"generation": 2}, expected_version=1)
    assert VersionedDocument({"generation": 2}, 2) == document.load()


def test_document_is_a_copy(open_document: Open):
    """What the caller does to its values afterwards does not reach the document."""
    document = open_document()
    content: dict[str, Any] = {"keys": []}
    document.replace(content, expected_version=0)
    content["keys"].append("x")
    loaded = document.load()
    assert loaded is not None
    loaded.content["keys"].append("y")
    assert VersionedDocument({"keys": []}, 1) == document.load()


@pytest.mark.parametrize("expected", [0, 2, 99])
def test_write_on_another_version_is_a_conflict(open_document: Open, expected: int):
    """Only who read the newest version may replace it, and the loser changes nothing."""
    document = open_document()
    document.replace({"n": 1}, expected_version=0)
    with pytest.raises(DocumentConflictError):
        open_document().replace({"n": 2}, expected_version=expected)
    assert VersionedDocument({"n": 1}, 1) == document.load()


def test_k01_of_many_writers_one_wins(open_document: Open):
    """Eight replicas replace the same version at the same moment, five times over: each time exactly one wins."""
    documents = [open_document() for _ in range(8)]
    for version in range(5):
        barrier = threading.Barrier(len(documents))
        won: list[int] = []
        lost: list[int] = []
        threads = [
            threading.Thread(target=_replace, args=(document, number, version, barrier, won, lost))
            for number, document in enumerate(documents)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (1, 7) == (len(won), len(lost))
        assert VersionedDocument({"by": won[0]}, version + 1) == documents[0].load()


def _replace(
    document: KeyringDocument, number: int, version: int, barrier: threading.Barrier, won: list[int], lost: list[int]
) -> None:
    barrier.wait()
    try:
        document.replace({"by": number}, expected_version=version)
    except DocumentConflictError:
        lost.append(number)
    else:
        won.append(number)


def test_large_document_is_kept(open_document: Open):
    """A keyring with many keys and tombstones fits: OpenBao refuses requests of more than 1,000 JSON strings."""
    content = {"keys": [{"kid": f"kid-{number}", "state": "REVOKED"} for number in range(1500)]}
    document = open_document()
    document.replace(content, expected_version=0)
    assert VersionedDocument(content, 1) == document.load()


# -- Vault alone -----------------------------------------------------------------------------------------------------


def _written(place: VaultPlace) -> VaultKeyringDocument:
    document = VaultKeyringDocument(place.session())
    document.replace({"generation": 1}, expected_version=0)
    document.replace({"generation": 2}, expected_version=1)
    return document


@pytest.mark.parametrize("knows", [True, False], ids=["seen before", "never seen"])
@pytest.mark.parametrize("how", ["soft-deleted", "destroyed", "wiped"])
def test_k04_deleted_document_is_not_none_yet(vault_place: VaultPlace, how: str, *, knows: bool):
    """Whichever way the document went, no replica takes it for an empty keyring; each says what happened."""
    document = _written(vault_place)
    if not knows:
        document = VaultKeyringDocument(vault_place.session())
    root = vault_place.root()
    if how == "soft-deleted":
        root.delete(f"{vault_place.kv_path}/keyring")
    elif how == "destroyed":
        root.write_data(f"carnet/destroy/{vault_place.environment}/keyring", data={"versions": [1, 2]})
    else:
        root.delete(f"{vault_place.metadata_path}/keyring")
    with pytest.raises(KeyStoreUnavailableError, match=r"deleted|wiped|not prepared"):
        document.load()


def test_k04_undeleted_document_is_read_again(vault_place: VaultPlace):
    """What was deleted softly is not lost, and the same object goes on with it."""
    document = _written(vault_place)
    vault_place.root().delete(f"{vault_place.kv_path}/keyring")
    with pytest.raises(KeyStoreUnavailableError):
        document.load()
    path = f"carnet/undelete/{vault_place.environment}/keyring"
    vault_place.root().write_data(path, data={"versions": [2]})
    assert VersionedDocument({"generation": 2}, 2) == document.load()


def test_k04_wiped_and_prepared_again_is_refused_by_who_saw_it(vault_place: VaultPlace):
    """A replica that knows the document does not start from nothing; one that is started anew does, as was asked."""
    document = _written(vault_place)
    root = vault_place.root()
    root.delete(f"{vault_place.metadata_path}/keyring")
    root.write_data(f"{vault_place.metadata_path}/keyring", data={"cas_required": True})
    with pytest.raises(KeyStoreUnavailableError, match="wiped"):
        document.load()
    assert VaultKeyringDocument(vault_place.session()).load() is None


def test_k04_rolled_back_document_is_refused(vault_place: VaultPlace):
    """A version lower than one that was seen is refused."""
    document = _written(vault_place)
    root = vault_place.root()
    root.delete(f"{vault_place.metadata_path}/keyring")
    root.write_data(f"{vault_place.kv_path}/keyring", data={"data": {"document": '{"generation":1}'}})
    with pytest.raises(KeyStoreUnavailableError, match="rolled back"):
        document.load()


def test_place_without_check_and_set_is_not_prepared(vault_place: VaultPlace):
    """Where Vault would take a write without a version, the keyring is not begun."""
    vault_place.root().write_data(f"{vault_place.metadata_path}/keyring", data={"cas_required": False})
    with pytest.raises(KeyStoreUnavailableError, match="run the bootstrap"):
        VaultKeyringDocument(vault_place.session()).load()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"document": "no json"},
        {"document": "[]"},
        {"document": "[" * 100_000},
        {"document": {"generation": 1}},
        {"document": "{}", "more": 1},
        {"generation": 1},
    ],
    ids=["empty", "no JSON", "a list", "too deep", "an object", "one member more", "bare"],
)
def test_document_of_another_form_is_refused(vault_place: VaultPlace, data: dict[str, object]):
    """What no broker wrote is refused whole."""
    body = {"data": data, "options": {"cas": 0}}
    vault_place.root().write_data(f"{vault_place.kv_path}/keyring", data=body)
    with pytest.raises(KeyStoreUnavailableError, match="makes no sense"):
        VaultKeyringDocument(vault_place.session()).load()


def test_loads_and_writes_of_one_object_at_once(vault_place: VaultPlace):
    """One object is shared by threads: a load that began before another's write is not taken for a rollback."""
    document = _written(vault_place)
    failures: list[Exception] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            try:
                document.load()
            except KeyStoreUnavailableError as error:
                failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for version in range(2, 42):
        document.replace({"generation": version}, expected_version=version)
    stop.set()
    for thread in threads:
        thread.join()
    assert [] == failures
