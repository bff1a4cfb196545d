from __future__ import annotations

import hashlib
import json
from dataclasses import FrozenInstanceError

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from joserfc.jwk import ECKey
from jwt import PyJWK

from carnet.encoding import base64url
from carnet.errors import InvalidKeySetError
from carnet.jwk import MAX_KEY_SET_BYTES, MAX_KEYS, KeySet, PublicJWK, is_thumbprint, thumbprint
from support.tokens import JWK, KEY, OTHER_JWK

# The key of RFC 9449 section 4.1, and its RFC 7638 thumbprint from section 6.1.
RFC_9449_X = "l8tFrhx-34tV3hRICRDY9zCkDlpBhF42UQUfWVAWBFs"
RFC_9449_Y = "9VE4jf_Ok_o64zbTTlcuNJajHmt6v9TDVrU0CdvGRDA"
RFC_9449_THUMBPRINT = "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"

P = 2**256 - 2**224 + 2**192 + 2**96 - 1


def members(**changes: object) -> dict[str, object]:
    """Return the members of a right key with `changes`; a change to `...` leaves the member out."""
    return {name: value for name, value in (JWK.to_dict() | changes).items() if value is not ...}


def number(value: int) -> str:
    """Return a coordinate as it stands in a JWK."""
    return base64url(value.to_bytes(32, "big")).decode()


def key_set(*keys: object, **more: object) -> str:
    """Return a JWK set of anything."""
    return json.dumps({"keys": list(keys)} | more)


def refusal(text: str | bytes) -> str:
    """Parse a key set that should not pass, and return what was wrong with it."""
    with pytest.raises(InvalidKeySetError) as caught:
        KeySet.parse(text)
    return str(caught.value)


def test_the_thumbprint_is_the_one_that_rfc_9449_prints() -> None:
    """RFC 7638, by the only elliptic curve example that an RFC gives."""
    parsed = PublicJWK.parse(members(x=RFC_9449_X, y=RFC_9449_Y, kid=RFC_9449_THUMBPRINT))
    assert RFC_9449_THUMBPRINT == thumbprint(parsed.public_key)


def test_the_thumbprint_hashes_the_required_members_in_lexical_order() -> None:
    """RFC 7638 section 3.2, spelt out on the key of RFC 7515 appendix A.3."""
    x, y = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"
    text = json.dumps({"kty": "EC", "crv": "P-256", "x": x, "y": y}, sort_keys=True, separators=(",", ":"))
    kid = base64url(hashlib.sha256(text.encode()).digest()).decode()
    assert kid == PublicJWK.parse(members(x=x, y=y, kid=kid)).kid


def test_other_libraries_read_the_key_and_agree_on_its_thumbprint() -> None:
    """joserfc computes the same thumbprint, and PyJWT loads the same point."""
    assert JWK.kid == ECKey.import_key(JWK.to_dict()).thumbprint()
    assert JWK.public_key.public_numbers() == PyJWK(JWK.to_dict()).key.public_numbers()


def test_a_coordinate_with_leading_zeros_keeps_its_32_bytes() -> None:
    """RFC 7518 section 6.2.1: the length says nothing about the value. One key in 128 would break otherwise."""
    short = next(
        jwk
        for scalar in range(1, 2000)
        if (jwk := PublicJWK.of(ec.derive_private_key(scalar, ec.SECP256R1()).public_key())).to_dict()["x"][0] == "A"
        and jwk.public_key.public_numbers().x < 2**248
    )
    assert short.public_key.public_numbers() == PublicJWK.parse(short.to_dict()).public_key.public_numbers()


def test_a_key_comes_back_from_its_members() -> None:
    """`to_dict` and `parse` are each other's reverse."""
    parsed = PublicJWK.parse(JWK.to_dict())
    assert JWK == parsed
    assert JWK.to_dict() == parsed.to_dict()
    assert ["kty", "crv", "x", "y", "kid", "use", "alg"] == list(parsed.to_dict())


def test_keys_are_equal_by_kid_and_do_not_change() -> None:
    """The `kid` is the digest of the key: nothing more needs to be compared."""
    same = PublicJWK.of(KEY.public_key())
    assert JWK == same
    assert hash(JWK) == hash(same)
    assert JWK != OTHER_JWK
    with pytest.raises(FrozenInstanceError):
        same.kid = OTHER_JWK.kid  # type: ignore[misc]


def test_a_key_under_the_name_of_another_is_refused() -> None:
    """A `kid` is not chosen: not in a document, and not by a caller either."""
    with pytest.raises(InvalidKeySetError, match="not the RFC 7638 thumbprint"):
        PublicJWK(OTHER_JWK.kid, JWK.public_key)
    with pytest.raises(InvalidKeySetError, match="not the RFC 7638 thumbprint"):
        PublicJWK.parse(members(kid=OTHER_JWK.kid))


@pytest.mark.parametrize(
    "key",
    [
        ec.derive_private_key(7, ec.SECP384R1()).public_key(),
        ec.derive_private_key(7, ec.SECP256K1()).public_key(),
        ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key(),
        rsa.RSAPublicNumbers(65537, 2**2047 + 1).public_key(),
    ],
    ids=["P-384", "secp256k1", "Ed25519", "RSA"],
)
def test_k14_a_key_of_another_kind_is_refused(key: PublicKeyTypes) -> None:
    """Every published key is a P-256 key, so the key decides the algorithm."""
    for make in (thumbprint, PublicJWK.of):
        with pytest.raises(InvalidKeySetError, match="not an elliptic curve key on P-256"):
            make(key)


@pytest.mark.parametrize("name", ["kty", "crv", "x", "y", "kid", "use", "alg"])
@pytest.mark.parametrize(
    "value",
    [..., None, "", 1, [], {}, "EC ", "ec", pytest.param("a" * 70_000, id="long"), pytest.param(10**5000, id="huge")],
)
def test_j08_a_member_that_is_missing_or_wrong_is_refused(name: str, value: object) -> None:
    """Every member is required, and has one right value for one key."""
    with pytest.raises(InvalidKeySetError) as caught:
        PublicJWK.parse(members(**{name: value}))
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": "secret-secret"}, "has the members"),
        ({"key_ops": ["verify"]}, "has the members"),
        ({"key_ops": ["sign"]}, "has the members"),
        ({"x5c": []}, "has the members"),
        ({"ext": True}, "has the members"),
        ({"use": "enc"}, "has use 'enc'"),
        ({"alg": "ES384"}, "has alg 'ES384'"),
        ({"alg": "es256"}, "has alg 'es256'"),
        ({"crv": "P-384"}, "has crv 'P-384'"),
        ({"kty": "EC2"}, "has kty 'EC2'"),
        ({"kty": 5}, "has kty of type int"),
    ],
)
def test_j08_a_key_outside_the_profile_is_refused(changes: dict[str, object], message: str) -> None:
    """Wrong use, wrong algorithm, more members than there should be, and above all a private key."""
    with pytest.raises(InvalidKeySetError, match=message) as caught:
        PublicJWK.parse(members(**changes))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "a", "alg": "HS256", "use": "sig"},
        {"kty": "RSA", "n": "AQAB", "e": "Aw", "kid": "a", "alg": "RS256", "use": "sig"},
        {"kty": "OKP", "crv": "Ed25519", "x": "AA", "kid": "a", "alg": "EdDSA", "use": "sig"},
        {"kty": "new", "kid": "a"},
        {},
    ],
    ids=["oct", "RSA", "OKP", "unknown", "nothing"],
)
def test_j08_a_key_of_another_type_refuses_the_whole_set(key: dict[str, str]) -> None:
    """A set with one foreign key did not come from a broker of Carnet; skipping the key would hide that."""
    assert "where exactly" in refusal(key_set(JWK.to_dict(), key))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (number(0), number(0)),
        (number(JWK.public_key.public_numbers().x), number(JWK.public_key.public_numbers().y ^ 1)),
        (number(P), number(1)),
        (number(JWK.public_key.public_numbers().x), number(P)),
        (number(2**256 - 1), number(2**256 - 1)),
    ],
    ids=["zero", "other-y", "x-is-p", "y-is-p", "all-ones"],
)
def test_j08_a_point_off_the_curve_is_refused(x: str, y: str) -> None:
    """An invalid curve attack starts with a point that nobody checked (RFC 8725 section 3.4)."""
    with pytest.raises(InvalidKeySetError, match="not a point of P-256"):
        PublicJWK.parse(members(x=x, y=y))


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("change", [lambda s: s + "=", lambda s: s[:-1], lambda s: "A" + s, lambda s: s[:-1] + "B"])
def test_j12_a_coordinate_in_another_spelling_is_refused(name: str, change: object) -> None:
    """Padded, short, long, or with unused bits: one point has one JWK."""
    with pytest.raises(InvalidKeySetError, match=f"has a {name} that is not 32 bytes"):
        PublicJWK.parse(members(**{name: change(JWK.to_dict()[name])}))  # type: ignore[operator]


def test_a_set_comes_back_from_its_json_in_one_order() -> None:
    """The published text depends on the keys alone, not on the order in which they were made."""
    one, other = KeySet.of([JWK, OTHER_JWK]), KeySet.of([OTHER_JWK, JWK])
    assert one.to_json() == other.to_json()
    assert one == KeySet.parse(one.to_json()) == KeySet.parse(one.to_json().encode())
    assert sorted([JWK.kid, OTHER_JWK.kid]) == list(one.keys)


def test_a_set_that_somebody_formatted_is_read() -> None:
    """White space is no fault: an operator may look at the file."""
    assert KeySet.of([JWK]) == KeySet.parse("\n" + json.dumps({"keys": [JWK.to_dict()]}, indent=2) + "\n")


def test_a_key_is_found_by_its_kid_only() -> None:
    """An unknown `kid` finds nothing."""
    keys = KeySet.of([JWK])
    assert JWK == keys.get(JWK.kid)
    assert None is keys.get(OTHER_JWK.kid)
    assert None is keys.get("")


def test_a_set_does_not_change() -> None:
    """Neither through the set nor through the dict that it was made of."""
    source = {JWK.kid: JWK}
    keys = KeySet(source)
    source.clear()
    assert JWK == keys.get(JWK.kid)
    with pytest.raises(TypeError):
        keys.keys["more"] = OTHER_JWK  # type: ignore[index]


def test_j08_a_set_with_no_keys_is_refused() -> None:
    """Empty is a fault of the publisher, never the answer that all keys are revoked."""
    for make in (lambda: KeySet({}), lambda: KeySet.of([]), lambda: KeySet.parse('{"keys":[]}')):
        with pytest.raises(InvalidKeySetError, match="1 to 100 keys, and this one 0"):
            make()


def test_j08_one_kid_twice_is_refused() -> None:
    """Two keys with one name cannot be told apart."""
    assert f"kid {JWK.kid} twice" in refusal(key_set(JWK.to_dict(), JWK.to_dict()))


def test_a_set_that_names_a_key_wrongly_is_refused() -> None:
    """The name under which a key is found is its own."""
    with pytest.raises(InvalidKeySetError, match="another kid than its own"):
        KeySet({OTHER_JWK.kid: JWK})


def test_k14_a_hundred_keys_are_a_set_and_one_more_is_not() -> None:
    """The limit is a limit, and well within the size that is allowed."""
    jwks = [PublicJWK.of(ec.derive_private_key(n, ec.SECP256R1()).public_key()) for n in range(1, MAX_KEYS + 2)]
    assert MAX_KEYS == len(KeySet.parse(KeySet.of(jwks[:-1]).to_json()).keys)
    with pytest.raises(InvalidKeySetError, match="and this one 101"):
        KeySet.of(jwks)
    assert "more than 102 objects" in refusal(key_set(*(jwk.to_dict() for jwk in jwks)))


def test_k10_a_set_at_the_size_limit_is_read_and_one_byte_more_is_not() -> None:
    """What comes from the network is measured before it is looked at."""
    text = KeySet.of([JWK]).to_json()
    padded = text + " " * (MAX_KEY_SET_BYTES - len(text))
    assert KeySet.of([JWK]) == KeySet.parse(padded)
    assert "longer than 65536 bytes" in refusal(padded + " ")
    assert "longer than 65536 bytes" in refusal((padded + " ").encode())


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"keys":{}}',
        '{"keys":null}',
        '{"keys":"x"}',
        '{"keys":[1]}',
        '{"keys":[null]}',
        '{"keys":[[]]}',
        '{"keys":["x"]}',
        '{"Keys":[]}',
        key_set(JWK.to_dict(), sequence=1),
    ],
)
def test_j08_a_document_of_another_shape_is_refused(text: str) -> None:
    """One member, `keys`, a list of objects."""
    assert "not one member 'keys'" in refusal(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not one JSON object"),
        ("[]", "not one JSON object"),
        (b"\xff\xfe{}", "not ASCII"),
        ('{"keys":["\N{LATIN SMALL LETTER E WITH ACUTE}"]}', "not ASCII"),
        (r'{"k\u0065ys":[]}', "an escape"),
        ('{"keys":[],"keys":[]}', "twice"),
        ('{"keys":[', "not one JSON object"),
        ('{"keys":[}', "line 1 column 10"),
    ],
)
def test_j11_a_document_that_is_not_strict_json_is_refused(text: str | bytes, message: str) -> None:
    """A key set is read by the rules of a token."""
    assert message in refusal(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RFC_9449_THUMBPRINT, True),
        (JWK.kid, True),
        (RFC_9449_THUMBPRINT + "=", False),
        (RFC_9449_THUMBPRINT + "\n", False),
        (RFC_9449_THUMBPRINT[:-1], False),
        (RFC_9449_THUMBPRINT[:-1] + "J", False),
        ("+" + RFC_9449_THUMBPRINT[1:], False),
        ("", False),
        (None, False),
        (43, False),
        ([RFC_9449_THUMBPRINT], False),
        (RFC_9449_THUMBPRINT.encode(), False),
    ],
)
def test_a_thumbprint_is_43_signs_of_canonical_base64url(text: object, expected: bool) -> None:
    """The form alone: of a `kid`, and of a certificate's ``x5t#S256``."""
    assert expected is is_thumbprint(text)
