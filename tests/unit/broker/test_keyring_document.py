"""The keyring as a document: lossless, and strict when read."""

from __future__ import annotations

import copy
import json

import pytest

from carnet_broker.core.keyring import Keyring
from carnet_broker.core.keyring_document import InvalidKeyringError, keyring_of_content, keyring_to_content
from support.keyrings import ISSUER, T0, TIMING, jwk, running


def rich_keyring() -> Keyring:
    """Return a keyring with a key in every state, with versions and answers."""
    keyring = running().with_activated(jwk(1).kid, T0, TIMING, answers=["a", "b"])
    keyring = keyring.with_created(jwk(2), 12, T0).with_published(jwk(2).kid, T0).with_created(jwk(3), None, T0)
    keyring = keyring.with_created(jwk(4), None, T0).with_revoked(jwk(4).kid, T0, TIMING)
    return keyring.with_destroyed(jwk(4).kid, T0).with_removed(jwk(0).kid, T0)


def read(content: object, issuer: str = ISSUER, store: str = "kv") -> Keyring:
    """Read a document as the test's broker."""
    return keyring_of_content(json.loads(json.dumps(content)), issuer=issuer, store=store)


def test_a_keyring_survives_its_document():
    """What is written is what is read, with every state, time, version and answer."""
    keyring = rich_keyring()
    assert keyring == read(keyring_to_content(keyring, store="kv"))


def test_the_document_holds_no_private_member():
    """Only public JWK members are written (RFC 7518 section 6.2.2: `d` is the private one)."""
    for key in keyring_to_content(rich_keyring(), store="kv")["keys"]:
        assert {"kty", "crv", "x", "y", "kid", "use", "alg"} == set(key["jwk"])


@pytest.mark.parametrize(("issuer", "store"), [("https://tokens.staging.example", "kv"), (ISSUER, "transit")])
def test_a_document_of_another_environment_or_key_store_is_refused(issuer, store):
    """A broker that is pointed at the wrong prefix must not serve its keys."""
    with pytest.raises(InvalidKeyringError, match="set up for"):
        read(keyring_to_content(rich_keyring(), store="kv"), issuer=issuer, store=store)


def _changed(path: tuple[str | int, ...], value: object) -> dict[str, object]:
    content = keyring_to_content(rich_keyring(), store="kv")
    content = copy.deepcopy(content)
    place: object = content
    for step in path[:-1]:
        place = place[step]  # type: ignore[index]
    if value is ...:
        del place[path[-1]]  # type: ignore[attr-defined]
    else:
        place[path[-1]] = value  # type: ignore[index]
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("form",), 2),
        (("form",), ...),
        (("surprise",), 1),
        (("generation",), 0),
        (("generation",), "7"),
        (("generation",), True),
        (("keys",), {}),
        (("keys", 0), "key"),
        (("keys", 0, "surprise"), 1),
        (("keys", 0, "jwk"), ...),
        (("keys", 0, "jwk"), []),
        (("keys", 0, "jwk", "d"), "secret"),
        (("keys", 0, "jwk", "kid"), jwk(9).kid),
        (("keys", 0, "state"), "SIGNING"),
        (("keys", 0, "state"), ...),
        (("keys", 1, "activated_at"), ...),
        (("keys", 1, "activated_at"), "yesterday"),
        (("keys", 1, "activated_at"), 17),
        (("keys", 1, "activated_at"), "2026-11-24T12:00:00"),
        (("keys", 1, "activated_at"), "2026-11-24T12:00:00+01:00"),
        (("keys", 1, "answers"), "a"),
        (("keys", 1, "answers"), [1]),
        (("keys", 2, "version"), "12"),
        (("keys", 2, "version"), 0),
        (("keys", 2, "state"), "ACTIVE"),
    ],
)
def test_a_document_that_breaks_a_rule_is_refused_whole(path, value):
    """One wrong member is enough: half a keyring is none."""
    with pytest.raises(InvalidKeyringError):
        read(_changed(path, value))


def test_a_document_with_a_key_twice_or_two_signers_is_refused():
    """The rules of the keyring hold for what is read, too."""
    content = keyring_to_content(running(), store="kv")
    twice = content | {"keys": [content["keys"][0], content["keys"][0]]}
    with pytest.raises(InvalidKeyringError, match="twice"):
        read(twice)
    second = dict(content["keys"][0]) | {"jwk": jwk(5).to_dict()}
    with pytest.raises(InvalidKeyringError, match="more than one ACTIVE"):
        read(content | {"keys": [content["keys"][0], second]})
