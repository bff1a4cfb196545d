"""What may be believed of the copy of the keyring in the shared store: who may sign it, and what is signed."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from carnet.errors import InvalidTokenError
from carnet.jwk import PublicJWK
from carnet.verify import assemble, parse_unverified, verify_signature
from carnet_broker.core.keyring import Keyring, KeyState
from carnet_broker.core.keyring_document import keyring_to_content
from carnet_broker.core.mirror import (
    MirrorCopy,
    MirrorNotBelievedError,
    MirrorSignature,
    may_vouch,
    mirror_signing_input,
)
from support import tokens
from support.keyrings import ISSUER, SECOND, T0, TIMING, jwk, running

OTHER_ISSUER = "https://tokens.test.example"
LATER = T0 + timedelta(minutes=10)


def private_key(number: int) -> ec.EllipticCurvePrivateKey:
    """Return the private half of `jwk(number)`."""
    key = ec.derive_private_key(1_000_003 + number, ec.SECP256R1())
    assert jwk(number) == PublicJWK.of(key.public_key())
    return key


def rotated(keyring: Keyring, number: int) -> Keyring:
    """Activate the standby, and publish key `number` as the next one."""
    keyring = keyring.with_activated(keyring.standby.kid, LATER, TIMING)
    return keyring.with_created(jwk(number), None, LATER).with_published(jwk(number).kid, LATER)


def signed(keyring: Keyring, number: int, **more: Any) -> MirrorCopy:  # noqa: ANN401 - of `mirror_signing_input`
    """Return a mirror of `keyring` as the holder of key `number` signs it."""
    content = keyring_to_content(keyring, store="kv")
    what = {"issuer": keyring.issuer, "generation": keyring.generation} | more
    signature = MirrorSignature(
        jwk(number).kid, tokens.sign(mirror_signing_input(content, **what), private_key(number))
    )
    return MirrorCopy(keyring, keyring.generation, content, signature)


def refused(mirror: MirrorCopy, anchor: Keyring | None) -> str:
    """Return why `mirror` is not believed."""
    with pytest.raises(MirrorNotBelievedError) as error:
        mirror.check(anchor)
    assert "MIRROR_NOT_BELIEVED" == error.value.code
    return str(error.value)


@pytest.mark.parametrize("number", [0, 1], ids=["active", "standby"])
def test_a_mirror_signed_by_the_active_or_standby_key_of_what_is_trusted_is_believed(number):
    """The standby of yesterday signs after one rotation that the reader has not seen."""
    signed(rotated(running(), 2), number).check(running())


def test_a_mirror_signed_by_a_key_that_is_not_known_is_refused():
    """After two rotations that the reader has not seen, or by whoever has a key of their own."""
    mirror = signed(rotated(rotated(running(), 2), 3), 2)
    assert f"it is signed by key {jwk(2).kid}, which is not known in generation 5" in refused(mirror, running())
    mirror.check(rotated(running(), 2))


@pytest.mark.parametrize("state", [state for state in KeyState if state not in {KeyState.ACTIVE, KeyState.STANDBY}])
def test_k12_a_mirror_signed_by_a_key_of_another_state_is_refused(state):
    """A key that has retired signs no later mirror, one that was revoked none at all, one that is pending not yet."""
    trusted = running()
    trusted = replace(trusted, keys=(replace(trusted.keys[0], state=state), *trusted.keys[1:]))
    assert f"which is {state} in generation 5" in refused(signed(rotated(running(), 2), 0), trusted)


def test_a_mirror_that_nobody_signed_is_refused():
    """As a broker of the version before writes it."""
    mirror = replace(signed(rotated(running(), 2), 0), signature=None)
    assert "generation 8, is not believed: it is not signed" in refused(mirror, running())


def test_nothing_is_believed_where_nothing_is_trusted():
    """A broker that starts without Vault and has kept nothing."""
    assert "no keyring is trusted here yet" in refused(signed(running(), 0), None)


def test_a_mirror_signed_in_the_name_of_another_key_is_refused():
    """The signature is checked with the key that is named."""
    mirror = signed(rotated(running(), 2), 1)
    forged = replace(mirror, signature=replace(mirror.signature, kid=jwk(0).kid))
    assert f"its signature is not one of key {jwk(0).kid}" in refused(forged, running())


@pytest.mark.parametrize("signature", [b"", bytes(64), b"\xff" * 64, b"\x01" * 64, b"\x01" * 63])
def test_a_forged_signature_is_refused(signature):
    """Of whatever length and numbers."""
    mirror = replace(signed(running(), 0), signature=MirrorSignature(jwk(0).kid, signature))
    assert "its signature is not one of" in refused(mirror, running())


def test_a_mirror_of_another_environment_is_refused():
    """Though the key is trusted in both, and the generation is the same."""
    keyring = rotated(running(), 2)
    assert "its signature is not one of" in refused(signed(keyring, 0, issuer=OTHER_ISSUER), running())
    elsewhere = signed(replace(keyring, issuer=OTHER_ISSUER), 0)
    assert "its signature is not one of" in refused(elsewhere, running())
    elsewhere.check(replace(running(), issuer=OTHER_ISSUER))


def test_a_mirror_that_is_entered_or_signed_as_another_generation_is_refused():
    """An older one cannot be made to look later; whichever of the two numbers is changed."""
    mirror = signed(running(), 0)
    assert "it is entered as generation 6" in refused(replace(mirror, generation=6), running())
    later = replace(running(), generation=6)
    copy = MirrorCopy(later, 6, keyring_to_content(later, store="kv"), mirror.signature)
    assert "its signature is not one of" in refused(copy, running())
    assert "its signature is not one of" in refused(signed(later, 0, generation=5), running())


@pytest.mark.parametrize("member", ["issuer", "store", "form", "generation", "keys", "surprise"])
def test_a_mirror_whose_text_was_altered_is_refused(member):
    """Any of it."""
    mirror = signed(rotated(running(), 2), 0)
    assert "its signature is not one of" in refused(replace(mirror, content=mirror.content | {member: "x"}), running())


def test_members_in_another_order_are_the_same_mirror():
    """A database may give JSON back in its own order."""
    mirror = signed(running(), 0)
    turned = json.loads(json.dumps(dict(reversed(mirror.content.items()))))
    replace(mirror, content=turned).check(running())


def test_no_two_mirrors_are_signed_alike():
    """What is moved from one part to the next is another mirror."""
    content = {"a": 1}
    inputs = {
        mirror_signing_input(content, issuer="issuer", generation=12),
        mirror_signing_input(content, issuer="issuer1", generation=2),
        mirror_signing_input(content, issuer="issuer", generation=1),
        mirror_signing_input({"a": "1"}, issuer="issuer", generation=12),
        mirror_signing_input({"a": True}, issuer="issuer", generation=12),
    }
    assert 5 == len(inputs)


def test_the_form_of_what_is_signed_does_not_change():
    """Brokers of two versions check what the other has signed. Another form needs another version in the prefix."""
    expected = (
        b"carnet keyring mirror v1\x00\x00\x00\x00\x00\x00\x00\x00\x04https"[:-1]
        + b"\x00\x00\x00\x00\x00\x00\x00\x0212"
        + b"\x00\x00\x00\x00\x00\x00\x00\x10"
        + b'{"a": 1, "b": 2}'
    )
    assert expected == mirror_signing_input({"b": 2, "a": 1}, issuer="http", generation=12)


# -- one key, two uses -------------------------------------------------------------------------------------------------


def test_the_signature_of_a_token_is_none_of_a_mirror():
    """Whoever can have tokens made cannot have mirrors made, whatever their claims."""
    text = tokens.token(tokens.header(kid=jwk(0).kid), key=private_key(0))
    verify_signature(jwk(0), parse_unverified(text).signing_input, parse_unverified(text).signature)
    signature = MirrorSignature(jwk(0).kid, parse_unverified(text).signature)
    assert "its signature is not one of" in refused(replace(signed(running(), 0), signature=signature), running())


def test_the_signature_of_a_mirror_is_none_of_a_token():
    """What a mirror signs cannot be written as a token, and under a token its signature is not good."""
    mirror = signed(running(), 0)
    signing_input = mirror_signing_input(mirror.content, issuer=ISSUER, generation=mirror.generation)
    with pytest.raises(InvalidTokenError, match=r"the token is not ASCII|not three parts|the header"):
        parse_unverified(assemble(signing_input, mirror.signature.signature))
    good = parse_unverified(tokens.token(tokens.header(kid=jwk(0).kid), key=private_key(0)))
    with pytest.raises(InvalidTokenError, match="the signature is not one"):
        verify_signature(jwk(0), good.signing_input, mirror.signature.signature)


def test_what_a_mirror_signs_begins_as_no_signing_input_of_a_jws_can():
    """Those are letters, digits, ``-``, ``_`` and dots (RFC 7515 section 5.1); this has a zero byte up front."""
    signing_input = mirror_signing_input({}, issuer=ISSUER, generation=1)
    assert 24 == signing_input.index(b"\x00")
    assert signing_input.startswith(b"carnet keyring mirror v1\x00")


# -- later, and kept ---------------------------------------------------------------------------------------------------


def test_whether_a_mirror_claims_to_be_later():
    """By the number that the store has it under, or by its own."""
    mirror = signed(running(), 0)
    assert not mirror.is_later_than(running())
    assert not mirror.is_later_than(replace(running(), generation=6))
    assert mirror.is_later_than(replace(running(), generation=4))
    assert mirror.is_later_than(None)
    assert replace(mirror, generation=6).is_later_than(running())
    assert replace(mirror, generation=4, keyring=replace(running(), generation=6)).is_later_than(running())


def test_a_kept_keyring_vouches_until_its_key_was_to_be_replaced():
    """And not without one."""
    until = running().active.sign_until
    assert may_vouch(running(), until - timedelta(microseconds=1))
    assert not may_vouch(running(), until)
    assert not may_vouch(running(), until + SECOND)
    assert not may_vouch(running().with_revoked(jwk(1).kid, T0, TIMING).with_revoked(jwk(0).kid, T0, TIMING), T0)
