"""A Transit and a KV that say what cannot be: no such answer becomes a signature, a key, a keyring or a request."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from carnet.encoding import base64url
from carnet_broker.edges.vault import (
    KvKeyStore,
    TransitKeyStore,
    VaultKeyringDocument,
    VaultRotationRequests,
    VaultSession,
)
from carnet_broker.ports import (
    KeyStoreUnavailableError,
    RequestKind,
    RequestResult,
    RequestStatus,
    RotationRequest,
    StoredKey,
)
from support.lying_vault import Lie, LyingVault, Received, reply
from support.vault_lies import GOOD, KEY, METADATA, OPERATIONS, PEM, STORED, TRANSIT_KEY, fails, settings_for


@pytest.fixture(name="vault")
def _vault() -> Iterator[LyingVault]:
    """A server that can be told to lie."""
    with LyingVault().listening() as vault:
        yield vault


@pytest.fixture(name="session")
def _session(vault: LyingVault) -> Iterator[VaultSession]:
    """A session with it."""
    session = VaultSession(settings_for(vault))
    yield session
    session.close()


# -- a Transit that lies ---------------------------------------------------------------------------------------------


def _raw(signing_input: bytes, key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    r, s = decode_dss_signature(key.sign(signing_input, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


def _signing(make: Callable[[bytes], dict[str, object]]) -> Lie:
    """Return a Transit that answers a signature with what `make` says of the input."""

    def lie(received: Received, send: Callable[[bytes], None]) -> None:
        send(reply(200, {"data": make(base64.b64decode(received.data["input"]))}))

    return lie


_OTHER = ec.generate_private_key(ec.SECP256R1())


def _text(signature: bytes, version: object = 2) -> str:
    return f"vault:v{version}:{base64url(signature).decode()}"


_WRONG_SIGNATURES: dict[str, Callable[[bytes], dict[str, object]]] = {
    "by another key": lambda data: {"key_version": 2, "signature": _text(_raw(data, _OTHER))},
    "of another input": lambda data: {"key_version": 2, "signature": _text(_raw(data + b"x"))},
    "of nothing": lambda _: {"key_version": 2, "signature": _text(_raw(b""))},
    "all zero": lambda _: {"key_version": 2, "signature": _text(bytes(64))},
    "another version in the number": lambda data: {"key_version": 3, "signature": _text(_raw(data))},
    "another version in the text": lambda data: {"key_version": 2, "signature": _text(_raw(data), 3)},
    "another version in both": lambda data: {"key_version": 3, "signature": _text(_raw(data), 3)},
    "the version twenty": lambda data: {"key_version": 2, "signature": _text(_raw(data), 20)},
    "a version that is a text": lambda data: {"key_version": "2", "signature": _text(_raw(data))},
    "no version in the text": lambda data: {"key_version": 2, "signature": base64url(_raw(data)).decode()},
    "DER": lambda data: {"key_version": 2, "signature": _text(KEY.sign(data, ec.ECDSA(hashes.SHA256())))},
    "too short": lambda data: {"key_version": 2, "signature": _text(_raw(data)[:63])},
    "too long": lambda data: {"key_version": 2, "signature": _text(_raw(data) + b"\0")},
    "padded": lambda data: {"key_version": 2, "signature": _text(_raw(data)) + "=="},
    "not canonical": lambda data: {"key_version": 2, "signature": _text(_raw(data))[:-1] + "_"},
    "not ASCII": lambda data: {"key_version": 2, "signature": _text(_raw(data)) + "\u00e9"},
    "empty": lambda _: {"key_version": 2, "signature": "vault:v2:"},
    "null": lambda _: {"key_version": 2, "signature": None},
    "missing": lambda _: {"key_version": 2},
}


@pytest.mark.parametrize("what", _WRONG_SIGNATURES)
def test_transit_answer_with_a_wrong_signature_is_refused(vault: LyingVault, session: VaultSession, what: str):
    """No signature leaves that is not good for the public key of the version that was asked for."""
    vault.otherwise = _signing(_WRONG_SIGNATURES[what])
    error = fails(session, OPERATIONS["sign with Transit"])
    assert "makes no sense" in str(error)


def test_transit_answer_with_a_good_signature_is_returned(vault: LyingVault, session: VaultSession):
    """The twin: what is signed by the right key, version and input is returned as it is; the version is pinned."""
    made: list[bytes] = []

    def sign(data: bytes) -> dict[str, object]:
        made.append(_raw(data))
        return {"key_version": 2, "signature": _text(made[-1])}

    vault.otherwise = _signing(sign)
    vault.lies["transit/keys/carnet-prod"] = reply(200, {"data": TRANSIT_KEY})
    assert TransitKeyStore(session).sign(STORED.jwk, 2, b"a.b") == made[-1]
    signer = TransitKeyStore(session).signer(STORED)
    assert signer.sign(b"c.d") == made[-1]
    asked = [received for received in vault.received if received.path.startswith("transit/sign/")]
    assert {"transit/sign/carnet-prod/sha2-256"} == {received.path for received in asked}
    assert {(2, "jws", False)} == {
        (one.data["key_version"], one.data["marshaling_algorithm"], one.data["prehashed"]) for one in asked
    }


def test_signer_of_a_transit_that_signs_wrongly_is_none(vault: LyingVault, session: VaultSession):
    """A key is proven before it is used: where the proof fails there is no signer."""
    vault.lies["transit/keys/carnet-prod"] = reply(200, {"data": TRANSIT_KEY})
    vault.otherwise = _signing(_WRONG_SIGNATURES["by another key"])
    fails(session, OPERATIONS["load from Transit"])


@pytest.mark.parametrize(
    "change",
    [
        {"type": "rsa-2048"},
        {"exportable": True},
        {"exportable": None},
        {"allow_plaintext_backup": True},
        {"latest_version": "2"},
        {"latest_version": True},
        {"latest_version": -1},
        {"latest_version": 7},
        {"min_encryption_version": None},
        {"keys": None},
        {"keys": {"two": {"public_key": PEM}}},
        {"keys": {"\u0662": {"public_key": PEM}}},
        {"keys": {"2": 1700000000}},
        {"keys": {"2": {"public_key": 7}}},
        {"keys": {"2": {"public_key": "x"}}},
        {"keys": {"2": {"public_key": "\u00e9"}}},
    ],
    ids=lambda change: str(change)[:40],  # Without the key, which is another one in each process.
)
def test_transit_key_that_makes_no_sense_is_refused(
    vault: LyingVault, session: VaultSession, change: dict[str, object]
):
    """A key of which anything is not as it must be gives no new key."""
    vault.lies["transit/keys/carnet-prod/rotate"] = reply(200, {"data": TRANSIT_KEY | change})
    fails(session, OPERATIONS["create in Transit"])


def test_rotation_that_does_not_say_what_it_made(vault: LyingVault, session: VaultSession):
    """Older servers answer a rotation with nothing: the newest version is read, as a number."""
    keys = {str(version): {"public_key": PEM} for version in range(1, 12)}
    described = {"data": TRANSIT_KEY | {"latest_version": 11, "keys": keys}}
    vault.lies["transit/keys/carnet-prod/rotate"] = b"HTTP/1.1 204 No Content\r\n\r\n"
    vault.lies["transit/keys/carnet-prod"] = reply(200, described)
    assert StoredKey(STORED.jwk, 11) == TransitKeyStore(session).create()


def test_limits_that_another_client_undoes_end_in_an_error(vault: LyingVault, session: VaultSession):
    """Trimming is tried a few times, each from a fresh look, and then given up with an error."""
    vault.lies["transit/keys/carnet-prod"] = reply(200, {"data": TRANSIT_KEY | {"latest_version": 9}})
    vault.lies["transit/keys/carnet-prod/config"] = reply(200, {})
    vault.lies["transit/keys/carnet-prod/trim"] = reply(400, {"errors": ["x"]})
    assert "another client" in str(fails(session, OPERATIONS["destroy in Transit"]))
    vault.lies["transit/keys/carnet-prod/config"] = reply(400, {"errors": ["x"]})
    assert "another client" in str(fails(session, OPERATIONS["destroy in Transit"]))


def test_lost_race_of_transit_is_tried_again_and_given_up_in_the_end(vault: LyingVault, session: VaultSession):
    """OpenBao's answer to a lost race is not the end; if it does not stop, it is an error like others."""
    answers = [reply(500, {"errors": ["1 error occurred:\n\t* transaction commit failed\n\n"]})] * 2
    answers.append(reply(200, {"data": TRANSIT_KEY}))

    def race(_: Received, send: Callable[[bytes], None]) -> None:
        send(answers.pop(0) if len(answers) > 1 else answers[0])

    vault.lies["transit/keys/carnet-prod/rotate"] = race
    assert STORED == TransitKeyStore(session).create()
    answers[:] = [reply(500, {"errors": ["transaction commit failed"]})]
    with pytest.raises(KeyStoreUnavailableError, match="HTTP 500"):
        TransitKeyStore(session).create()


# -- a KV that lies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    ["2026-13-01T00:00:00Z", "2026-01-01T00:00:00", "2026-01-01T00:00:00+02:00", "2026-01-01 00:00:00Z", "", None, 7],
)
def test_time_that_is_none_is_refused(vault: LyingVault, session: VaultSession, written: object):
    """The time of an entry is aware UTC (RFC 3339), or the entry makes no sense."""
    vault.otherwise = reply(200, {"data": {"data": {"document": "{}"}, "metadata": {"version": 1}}})
    metadata = {"version": 1, "created_time": written}
    vault.otherwise = reply(200, {"data": {"data": {"document": "{}"}, "metadata": metadata}})
    fails(session, OPERATIONS["read the keyring"])


@pytest.mark.parametrize("fraction", ["", ".1", ".123456789"])
def test_time_is_read_in_every_length(vault: LyingVault, session: VaultSession, fraction: str):
    """Vault writes as many digits of a second as it needs."""
    metadata = {"version": 1, "created_time": f"2026-01-01T00:00:00{fraction}Z"}
    vault.otherwise = reply(200, {"data": {"data": {"document": "{}"}, "metadata": metadata}})
    assert VaultKeyringDocument(session).load() is not None


def test_metadata_that_make_no_sense_are_refused(vault: LyingVault, session: VaultSession):
    """Whether a keyring was ever written is read from its metadata, or is not known."""
    for data in (None, [], {}, {"current_version": "0", "cas_required": True}, {"current_version": None}):
        vault.lies["carnet/metadata/prod/keyring"] = reply(200, {"data": data})
        assert "makes no sense" in str(fails(session, OPERATIONS["read the keyring"]))
    vault.lies["carnet/metadata/prod/keyring"] = reply(200, {"data": {"current_version": 0, "cas_required": True}})
    assert VaultKeyringDocument(session).load() is None


def test_keyring_that_is_written_between_two_looks_is_read(vault: LyingVault, session: VaultSession):
    """Another replica may write the first keyring after we found none, and before we look at its metadata."""
    answers = [reply(404, {"errors": []}), GOOD]
    vault.lies["carnet/metadata/prod/keyring"] = reply(200, {"data": {"current_version": 1, "cas_required": True}})
    vault.lies["carnet/data/prod/keyring"] = lambda _, send: send(answers.pop(0))
    loaded = VaultKeyringDocument(session).load()
    assert loaded is not None
    assert 1 == loaded.version


def test_new_key_that_is_there_already_is_refused(vault: LyingVault, session: VaultSession):
    """A key of 256 random bits that Vault claims to hold already is a lie, and not taken for a lost race."""
    words = "check-and-set parameter did not match the current version"
    vault.otherwise = reply(400, {"errors": [words]})
    with pytest.raises(KeyStoreUnavailableError, match="is there already"):
        KvKeyStore(session).create()


def test_door_that_cannot_be_listed_is_passed_over(vault: LyingVault, session: VaultSession):
    """Whoever stuffs one door stops neither the other nor the broker, and it can be seen."""
    request_id = "0edbb4bb-d97f-4a40-94c0-57d6413e7513"
    kind = {"data": {"data": {"kind": "rotate-now"}, "metadata": METADATA}}
    vault.lies["carnet/metadata/prod/requests"] = reply(200, {"data": {"keys": ["x" * 36] * 300_000}})
    vault.lies["carnet/metadata/prod/breakglass"] = reply(200, {"data": {"keys": [request_id]}})
    vault.lies[f"carnet/data/prod/breakglass/{request_id}"] = reply(200, kind)
    box = VaultRotationRequests(session)
    assert [request_id] == [request.request_id for request in box.pending()]
    assert frozenset({"requests"}) == box.overfull
    assert 0 == box.sweep(before=datetime(2030, 1, 1, tzinfo=UTC))
    vault.lies["carnet/metadata/prod/requests"] = reply(404, {"errors": []})
    box.pending()
    assert frozenset() == box.overfull


def test_result_that_others_write_all_the_time_is_tried_again_later(vault: LyingVault, session: VaultSession):
    """A broker that loses the race for a result again and again gives up for this round, with an error."""
    request_id = "0edbb4bb-d97f-4a40-94c0-57d6413e7513"
    request = RotationRequest(request_id, RequestKind.ROTATE, datetime(2026, 1, 1, tzinfo=UTC), breakglass=False)
    vault.lies[f"carnet/data/prod/results/{request_id}"] = lambda received, send: send(
        reply(404, {"errors": []})
        if received.method == "GET"
        else reply(400, {"errors": ["check-and-set parameter did not match the current version"]})
    )
    with pytest.raises(KeyStoreUnavailableError, match="several brokers"):
        VaultRotationRequests(session).answer(request, RequestResult(RequestStatus.DONE, "ROTATED", "x"))
