"""What may lie under the name of a key in a real OpenBao, and must not become a signer."""

from __future__ import annotations

import base64
import pickle

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from carnet_broker.edges.vault import KvKeyStore, TransitKeyStore
from carnet_broker.ports import KeyLostError, KeyStoreUnavailableError, StoredKey
from support.vault import VaultPlace


def _pem(key: PrivateKeyTypes, encryption: serialization.KeySerializationEncryption | None = None) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    ).decode("ascii")


def _put(place: VaultPlace, key: StoredKey, data: dict[str, object]) -> None:
    """Overwrite the entry of `key`, as an intruder with more rights than the broker would."""
    place.root().write_data(f"{place.kv_path}/keys/{key.jwk.kid}", data={"data": data})


_WRONG_MATERIAL = {
    "another P-256 key": lambda: {"private_key": _pem(ec.generate_private_key(ec.SECP256R1()))},
    "P-384": lambda: {"private_key": _pem(ec.generate_private_key(ec.SECP384R1()))},
    "secp256k1": lambda: {"private_key": _pem(ec.generate_private_key(ec.SECP256K1()))},
    "P-224": lambda: {"private_key": _pem(ec.generate_private_key(ec.SECP224R1()))},
    "RSA": lambda: {"private_key": _pem(rsa.generate_private_key(65537, 2048))},
    "Ed25519": lambda: {"private_key": _pem(ed25519.Ed25519PrivateKey.generate())},
    "encrypted": lambda: {
        "private_key": _pem(ec.generate_private_key(ec.SECP256R1()), serialization.BestAvailableEncryption(b"x"))
    },
    "a public key": lambda: {
        "private_key": ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode("ascii")
    },
    "no PEM": lambda: {"private_key": "canary"},
    "empty text": lambda: {"private_key": ""},
    "not ASCII": lambda: {"private_key": "\u2028-----BEGIN PRIVATE KEY-----"},
    "a number": lambda: {"private_key": 7},
    "null": lambda: {"private_key": None},
    "a list": lambda: {"private_key": []},
    "nothing": dict,
    "another member": lambda: {"key": _pem(ec.generate_private_key(ec.SECP256R1()))},
}


@pytest.mark.parametrize("what", _WRONG_MATERIAL)
def test_k14_wrong_material_under_a_kid_is_refused(vault_place: VaultPlace, what: str):
    """What is not the P-256 key that the kid names is lost, and the error shows nothing of it."""
    store = KvKeyStore(vault_place.session())
    key = store.create()
    data = _WRONG_MATERIAL[what]()
    _put(vault_place, key, data)
    with pytest.raises(KeyLostError) as caught:
        store.signer(key)
    text = str(data.get("private_key", ""))
    lines = [line for line in text.splitlines() if len(line) > 5 and "-----" not in line]
    assert key.jwk.kid in str(caught.value)
    assert not any(line in str(caught.value) for line in lines)


def test_k14_a_member_beside_the_key_is_refused_and_the_key_alone_accepted(vault_place: VaultPlace):
    """The entry is exactly what the broker wrote: the same key with one more member is refused."""
    store = KvKeyStore(vault_place.session())
    key = store.create()
    entry = vault_place.root().read(f"{vault_place.kv_path}/keys/{key.jwk.kid}")
    data = entry["data"]["data"]
    _put(vault_place, key, data | {"note": "x"})
    with pytest.raises(KeyLostError):
        store.signer(key)
    _put(vault_place, key, data)
    assert key.jwk.kid == store.signer(key).kid


def test_k14_private_key_that_claims_the_public_half_of_another_is_refused(vault_place: VaultPlace):
    """A key file names its public half beside the private one: that they belong together is shown, not believed."""
    store = KvKeyStore(vault_place.session())
    key = store.create()
    stranger = ec.generate_private_key(ec.SECP256R1())
    der = stranger.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    mixed = der.replace(_point(stranger.public_key()), _point(key.jwk.public_key))
    assert mixed != der
    pem = f"-----BEGIN PRIVATE KEY-----\n{base64.b64encode(mixed).decode()}\n-----END PRIVATE KEY-----\n"
    _put(vault_place, key, {"private_key": pem})
    with pytest.raises(KeyLostError):
        store.signer(key)


def _point(public_key: ec.EllipticCurvePublicKey) -> bytes:
    return public_key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


@pytest.mark.parametrize("how", ["soft-deleted", "destroyed", "wiped"])
def test_k04_private_key_that_was_deleted_is_lost(vault_place: VaultPlace, how: str):
    """Whichever way an entry went, there is no signer; and what was deleted softly comes back when it is undeleted."""
    store = KvKeyStore(vault_place.session())
    key = store.create()
    root, name = vault_place.root(), f"{vault_place.environment}/keys/{key.jwk.kid}"
    if how == "soft-deleted":
        root.delete(f"carnet/data/{name}")
    elif how == "destroyed":
        root.write_data(f"carnet/destroy/{name}", data={"versions": [1]})
    else:
        root.delete(f"carnet/metadata/{name}")
    with pytest.raises(KeyLostError, match="deleted"):
        store.signer(key)
    if how == "soft-deleted":
        root.write_data(f"carnet/undelete/{name}", data={"versions": [1]})
        assert key.jwk.kid == store.signer(key).kid


def test_destroying_leaves_no_version_in_vault(vault_place: VaultPlace):
    """All versions of the entry are gone, with its metadata."""
    store = KvKeyStore(vault_place.session())
    key = store.create()
    store.destroy(key, live=[])
    assert vault_place.root().read(f"{vault_place.metadata_path}/keys/{key.jwk.kid}") is None


def test_broker_cannot_overwrite_a_private_key(vault_place: VaultPlace):
    """A key is written once: the broker's own role may not write another over it, even with check-and-set."""
    session = vault_place.session()
    key = KvKeyStore(session).create()
    path = f"{vault_place.kv_path}/keys/{key.jwk.kid}"
    with pytest.raises(KeyStoreUnavailableError, match="permission denied"):
        session.call("overwrite", "POST", path, {"data": {"private_key": "x"}, "options": {"cas": 1}})
    assert key.jwk.kid == KvKeyStore(session).signer(key).kid


def test_k13_signer_shows_its_key_nowhere(vault_place: VaultPlace):
    """Neither text nor pickle of a signer holds the private key."""
    store = KvKeyStore(vault_place.session())
    key = store.create()
    signer = store.signer(key)
    assert f"KvSigner({key.jwk.kid!r})" == repr(signer)
    assert not hasattr(signer, "__dict__")
    with pytest.raises(TypeError, match="private key"):
        pickle.dumps(signer)


@pytest.mark.parametrize("kind", ["rsa-2048", "ecdsa-p384", "ed25519", "aes256-gcm96"])
def test_k14_transit_key_of_another_type_is_refused(vault_place: VaultPlace, kind: str):
    """A named key that does not make ES256 signatures gives no key, and the error says what it must be."""
    vault_place.root().write_data(f"transit/keys/{vault_place.environment}-wrong", data={"type": kind})
    policy = {"policy": 'path "transit/*" { capabilities = ["read", "update"] }'}
    vault_place.root().write_data(f"sys/policies/acl/carnet-broker-{vault_place.environment}", data=policy)
    store = TransitKeyStore(vault_place.session(transit_key=f"{vault_place.environment}-wrong"))
    with pytest.raises(KeyStoreUnavailableError, match="not of type ecdsa-p256"):
        store.create()


@pytest.mark.parametrize("setting", ["exportable", "allow_plaintext_backup"])
def test_transit_key_that_may_leave_vault_is_refused(vault_place: VaultPlace, setting: str):
    """A named key that can be exported or backed up in the clear is none that never leaves Vault."""
    store = TransitKeyStore(vault_place.session())
    key = store.create()
    vault_place.root().write_data(f"transit/keys/carnet-{vault_place.environment}/config", data={setting: True})
    with pytest.raises(KeyStoreUnavailableError, match="may leave Vault"):
        store.create()
    with pytest.raises(KeyStoreUnavailableError, match="may leave Vault"):
        store.signer(key)


def test_k04_transit_version_that_may_not_sign_is_lost(vault_place: VaultPlace):
    """A version below Vault's own limit for signing is lost; the one above it is not."""
    store = TransitKeyStore(vault_place.session())
    key, newer = store.create(), store.create()
    path = f"transit/keys/carnet-{vault_place.environment}/config"
    vault_place.root().write_data(path, data={"min_encryption_version": newer.version})
    with pytest.raises(KeyLostError):
        store.signer(key)
    assert newer.jwk.kid == store.signer(newer).kid


def test_transit_key_without_a_version_is_lost(vault_place: VaultPlace):
    """An entry of a keyring that was in KV names no version: nothing is signed with a version that was guessed."""
    store = TransitKeyStore(vault_place.session())
    key = StoredKey(store.create().jwk)
    with pytest.raises(KeyLostError):
        store.signer(key)
    with pytest.raises(ValueError, match="is none"):
        store.destroy(key, live=[])


def test_old_transit_versions_are_trimmed(vault_place: VaultPlace):
    """What was destroyed is gone from Vault for good, with everything older, and the limits never go down again."""
    store = TransitKeyStore(vault_place.session())
    keys = [store.create() for _ in range(5)]
    store.destroy(keys[2], live=keys[3:])
    store.destroy(keys[0], live=keys[1:])
    settings = vault_place.root().read(f"transit/keys/carnet-{vault_place.environment}")["data"]
    assert sorted(str(key.version) for key in keys[3:]) == sorted(settings["keys"])
    assert keys[3].version == settings["min_available_version"] == settings["min_decryption_version"]
    signer = store.signer(keys[4])
    assert repr(signer) == f"TransitSigner({keys[4].jwk.kid!r}, version={keys[4].version})"
