"""The contract of `ports.KeyStore`: one suite for the fake, for KV and for Transit, the last two in a real OpenBao."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from carnet.jwk import PublicJWK
from carnet_broker.edges.vault import KvKeyStore, TransitKeyStore
from carnet_broker.ports import DocumentConflictError, KeyLostError, KeyStore, KeyStoreUnavailableError, StoredKey
from support.fakes import FakeKeyringDocument, FakeKeyStore
from support.vault import VaultPlace

_INPUT = b"eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0"
_KINDS = ["fake", "fake-versioned", "kv", "transit"]


@dataclass(frozen=True)
class Subject:
    """One implementation: `open` returns a store as another replica has it, on the same keys."""

    open: Callable[[], KeyStore]
    versioned: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", self.open())

    store: KeyStore = None  # type: ignore[assignment]


@pytest.fixture(params=_KINDS, name="subject")
def _subject(request: pytest.FixtureRequest) -> Subject:
    """Each implementation in turn."""
    if request.param.startswith("fake"):
        fake = FakeKeyStore(versioned=request.param == "fake-versioned")
        return Subject(lambda: fake, versioned=request.param == "fake-versioned")
    place: VaultPlace = request.getfixturevalue("vault_place")
    if request.param == "kv":
        return Subject(lambda: KvKeyStore(place.session()), versioned=False)
    return Subject(lambda: TransitKeyStore(place.session()), versioned=True)


def _is_signed_by(key: StoredKey, signing_input: bytes, signature: bytes) -> bool:
    """Verify with nothing of the project's own (RFC 7518 section 3.4: r and s, 32 bytes each)."""
    assert 64 == len(signature)
    r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
    try:
        key.jwk.public_key.verify(encode_dss_signature(r, s), signing_input, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def test_created_key_signs_and_its_public_key_verifies(subject: Subject):
    """The signature is good for the key's own public half and input, and for no other key and no other input."""
    key, other = subject.store.create(), subject.store.create()
    signer = subject.store.signer(key)
    signature = signer.sign(_INPUT)
    assert key.jwk.kid == signer.kid
    assert _is_signed_by(key, _INPUT, signature)
    assert not _is_signed_by(other, _INPUT, signature)
    assert not _is_signed_by(key, _INPUT + b"x", signature)


def test_another_replica_signs_with_the_same_key(subject: Subject):
    """What one replica created, another one finds by its name in the keyring alone."""
    key = subject.store.create()
    assert _is_signed_by(key, _INPUT, subject.open().signer(key).sign(_INPUT))


def test_more_than_ten_keys_stay_apart(subject: Subject):
    """Twelve keys sign each for itself: in Transit the versions are texts, where "2" sorts after "10"."""
    keys = [subject.store.create() for _ in range(12)]
    assert 12 == len({key.jwk.kid for key in keys})
    for key in keys:
        assert _is_signed_by(key, _INPUT, subject.store.signer(key).sign(_INPUT))
    if subject.versioned:
        versions = [key.version for key in keys]
        assert versions == sorted(versions, key=lambda version: version or 0)
        assert 12 == len(set(versions))
    else:
        assert {None} == {key.version for key in keys}


def test_destroyed_key_refuses_to_sign(subject: Subject):
    """After `destroy` no replica gets a signer for the key, and the live one goes on; doing it twice is fine."""
    key, live = subject.store.create(), subject.store.create()
    live_signer = subject.store.signer(live)
    subject.store.destroy(key, live=[live])
    subject.store.destroy(key, live=[live])
    for store in (subject.store, subject.open()):
        with pytest.raises(KeyLostError, match=r"lost|deleted|gone"):
            store.signer(key)
        assert _is_signed_by(live, _INPUT, store.signer(live).sign(_INPUT))
    assert _is_signed_by(live, _INPUT, live_signer.sign(_INPUT))


def test_last_key_can_be_destroyed(subject: Subject):
    """With no live key at all the key is still destroyed, and the next one is another."""
    key = subject.store.create()
    subject.store.destroy(key, live=[])
    with pytest.raises(KeyLostError):
        subject.store.signer(key)
    following = subject.store.create()
    assert key.jwk != following.jwk
    assert _is_signed_by(following, _INPUT, subject.store.signer(following).sign(_INPUT))


def test_live_key_is_never_destroyed(subject: Subject):
    """To destroy a key that is among the live ones is a fault of the caller, and changes nothing."""
    key = subject.store.create()
    with pytest.raises(ValueError, match="in use"):
        subject.store.destroy(key, live=[key])
    assert _is_signed_by(key, _INPUT, subject.store.signer(key).sign(_INPUT))


def test_destroying_a_newer_key_leaves_the_older_live_one(subject: Subject):
    """A revoked key may be newer than one that is still in use: that one goes on."""
    older, newer = subject.store.create(), subject.store.create()
    subject.store.destroy(newer, live=[older])
    assert _is_signed_by(older, _INPUT, subject.store.signer(older).sign(_INPUT))
    following = subject.store.create()
    subject.store.destroy(older, live=[following])
    for key in (older, newer):
        with pytest.raises(KeyLostError):
            subject.store.signer(key)
    assert _is_signed_by(following, _INPUT, subject.store.signer(following).sign(_INPUT))


def test_destroying_with_an_old_list_of_live_keys_destroys_no_newer_one(subject: Subject):
    """A replica that has not heard of the newest keys does not destroy them."""
    old, live = subject.store.create(), subject.store.create()
    newest = subject.store.create()
    subject.store.destroy(old, live=[live])
    for key in (live, newest):
        assert _is_signed_by(key, _INPUT, subject.store.signer(key).sign(_INPUT))


def test_k04_another_key_under_the_name_is_refused(subject: Subject):
    """A keyring entry whose public key is not that of the private key is lost, and no signer comes of it."""
    key, other = subject.store.create(), subject.store.create()
    stranger = PublicJWK.of(ec.generate_private_key(ec.SECP256R1()).public_key())
    with pytest.raises(KeyLostError):
        subject.store.signer(StoredKey(stranger, key.version))
    if subject.versioned:
        with pytest.raises(KeyLostError):
            subject.store.signer(StoredKey(key.jwk, 999))
    assert _is_signed_by(other, _INPUT, subject.store.signer(other).sign(_INPUT))


def test_k01_creates_at_once_and_one_document(subject: Subject):
    """Eight replicas create at the same moment: every key that one of them got signs, and the document takes one.

    In Transit two may get the same version, the newest; then the one before it is named by nobody, and never will be.
    """
    stores = [subject.open() for _ in range(8)]
    document = FakeKeyringDocument()
    barrier = threading.Barrier(len(stores))
    made: list[StoredKey] = []
    lost: list[StoredKey] = []

    def create(store: KeyStore) -> None:
        barrier.wait()
        key = store.create()
        made.append(key)
        try:
            document.replace({"kid": key.jwk.kid, "version": key.version}, expected_version=0)
        except DocumentConflictError:
            lost.append(key)

    threads = [threading.Thread(target=create, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 8 == len(made)
    assert 7 == len(lost)
    for key in made:
        assert _is_signed_by(key, _INPUT, subject.store.signer(key).sign(_INPUT))
    if subject.versioned:
        assert len({key.version for key in made}) == len({key.jwk.kid for key in made})
    else:
        assert 8 == len({key.jwk.kid for key in made})
    adopted = document.load()
    assert adopted is not None
    live = [key for key in made if key.jwk.kid == adopted.content["kid"]]
    for key in lost:
        if key.jwk != live[0].jwk:
            subject.store.destroy(key, live=live)
    assert _is_signed_by(live[0], _INPUT, subject.store.signer(live[0]).sign(_INPUT))
    assert subject.store.create().jwk not in [key.jwk for key in made]


def test_one_signer_serves_many_threads(subject: Subject):
    """A signer is shared by all issuing threads: no signature goes to the wrong one."""
    key = subject.store.create()
    signer = subject.store.signer(key)
    wrong: list[bytes] = []

    def sign(number: int) -> None:
        for turn in range(10):
            signing_input = b"%d.%d" % (number, turn)
            if not _is_signed_by(key, signing_input, signer.sign(signing_input)):
                wrong.append(signing_input)

    threads = [threading.Thread(target=sign, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == wrong


def test_signer_that_was_made_before_its_key_was_destroyed(subject: Subject):
    """What holds no key itself (Transit) cannot sign any more; what holds one (KV) is let go by its owner."""
    key, live = subject.store.create(), subject.store.create()
    signer = subject.store.signer(key)
    subject.store.destroy(key, live=[live])
    if subject.versioned:
        with pytest.raises(KeyStoreUnavailableError):
            signer.sign(_INPUT)
    else:
        assert _is_signed_by(key, _INPUT, signer.sign(_INPUT))
