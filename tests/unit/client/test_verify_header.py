from __future__ import annotations

import base64
import hmac
import json

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from carnet.encoding import base64url
from carnet.errors import InvalidTokenReason
from carnet.jwk import KeySet
from carnet.verify import raw_signature
from support.seal import ReachedOutsideError, sealed
from support.tokens import JWK, KEY, KEYS, OTHER_JWK, OTHER_KEY, accept, compact, header, payload, refusal, token

MALFORMED, BAD_ALGORITHM = InvalidTokenReason.MALFORMED, InvalidTokenReason.BAD_ALGORITHM
BAD_SIGNATURE, UNKNOWN_KEY = InvalidTokenReason.BAD_SIGNATURE, InvalidTokenReason.UNKNOWN_KEY
RSA_KEY = rsa.generate_private_key(65537, 2048)
PUBLIC = KEY.public_key()
PKCS1 = padding.PKCS1v15()
PSS = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
SHA256 = hashes.SHA256()


def other_case(text: str) -> str:
    """Return `text` with the case of its first letter turned."""
    place = next(n for n, sign in enumerate(text) if sign.isalpha())
    return text[:place] + text[place].swapcase() + text[place + 1 :]


def test_the_right_token_is_accepted() -> None:
    """The twin of every refusal below."""
    assert "payments" == accept(token()).audience


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "nOnE", "none ", "", None, ..., [], ["ES256"], 256, True, {}])
@pytest.mark.parametrize("signature", [b"", b"x", bytes(64), None], ids=["empty", "short", "zeros", "right"])
def test_j01_a_token_that_claims_to_need_no_signature_is_refused(alg: object, signature: bytes | None) -> None:
    """With an empty signature, garbage, and even a right one: the header must say ES256."""
    expected = MALFORMED if signature == b"" else BAD_ALGORITHM  # An empty part is seen first.
    assert expected is refusal(token(header(alg=alg), signature=signature))


@pytest.mark.parametrize(("alg", "digest"), [("HS256", "sha256"), ("HS384", "sha384"), ("HS512", "sha512")])
@pytest.mark.parametrize(
    "secret",
    [
        PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).rstrip(b"\n"),
        PUBLIC.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        PUBLIC.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
        PUBLIC.public_bytes(Encoding.X962, PublicFormat.CompressedPoint),
        PUBLIC.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        PUBLIC.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n",
        compact(JWK.to_dict()),
        json.dumps(JWK.to_dict()).encode(),
        KEYS.to_json().encode(),
        JWK.kid.encode(),
        b"",
    ],
    ids=[
        "pem",
        "pem-no-newline",
        "der",
        "point",
        "compressed",
        "ssh",
        "ssh-newline",
        "jwk",
        "jwk-spaces",
        "jwks",
        "kid",
        "empty",
    ],
)
def test_j02_a_mac_keyed_with_the_public_key_is_refused(alg: str, digest: str, secret: bytes) -> None:
    """CVE-2015-9235, CVE-2026-48526: what everybody knows is not a secret. Also if the header says ES256."""
    for said in (alg, "ES256"):
        signing_input = base64url(compact(header(alg=said))) + b"." + base64url(compact(payload()))
        mac = hmac.digest(secret, signing_input, digest)
        by_length = BAD_SIGNATURE if len(mac) == 64 else MALFORMED
        expected = by_length if said == "ES256" else BAD_ALGORITHM
        assert expected is refusal((signing_input + b"." + base64url(mac)).decode())


@pytest.mark.parametrize(
    "alg",
    [
        "ES384",
        "ES512",
        "RS256",
        "PS256",
        "EdDSA",
        "Ed25519",
        "ES256K",
        "es256",
        "Es256",
        "ES256 ",
        " ES256",
        "ES2560",
        "dir",
    ],
)
def test_j03_another_algorithm_than_that_of_the_key_is_refused(alg: str) -> None:
    """The algorithm is ours, spelt in one way; here the signature under it is even right."""
    assert BAD_ALGORITHM is refusal(token(header(alg=alg)))


@pytest.mark.parametrize(
    ("alg", "sign"),
    [
        ("ES384", lambda m: ec.derive_private_key(9, ec.SECP384R1()).sign(m, ec.ECDSA(hashes.SHA384()))),
        ("ES256K", lambda m: raw_signature(ec.derive_private_key(9, ec.SECP256K1()).sign(m, ec.ECDSA(SHA256)))),
        ("ES256", lambda m: raw_signature(OTHER_KEY.sign(m, ec.ECDSA(SHA256)))),
        ("ES512", lambda m: raw_signature(KEY.sign(m, ec.ECDSA(hashes.SHA512())))),
        ("RS256", lambda m: RSA_KEY.sign(m, PKCS1, SHA256)),
        ("PS256", lambda m: RSA_KEY.sign(m, PSS, SHA256)),
        ("EdDSA", lambda m: ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)).sign(m)),
    ],
)
def test_j04_a_signature_made_with_another_algorithm_or_key_is_refused(alg: str, sign: object) -> None:
    """CVE-2026-48523: whether the header tells the truth or says ES256, only ES256 by the named key counts."""
    for said in (alg, "ES256"):
        head = header(alg=said)
        signing_input = base64url(compact(head)) + b"." + base64url(compact(payload()))
        signature = sign(signing_input)  # type: ignore[operator]
        expected = BAD_SIGNATURE if len(signature) == 64 else MALFORMED
        assert (expected if said == "ES256" else BAD_ALGORITHM) is refusal(token(head, signature=signature))


@pytest.mark.parametrize(
    "extra",
    [
        {"jwk": OTHER_JWK.to_dict()},
        {"jku": "https://evil.example/jwks"},
        {"jku": "file:///etc/passwd"},
        {"x5u": "https://evil.example/chain"},
        {"x5c": [base64.b64encode(b"certificate").decode()]},
        {"x5t": "yYMz1CcFbOoLGCXV8L9j9Xk1QyE"},
        {"x5t#S256": "A4DtL2JmUMhAsvJj5tKyn64SqzmuXbMrJa0n761y5v0"},
        {"crit": ["jwk"], "jwk": OTHER_JWK.to_dict()},
    ],
    ids="-".join,
)
def test_j05_a_key_that_the_token_brings_along_is_refused_unseen(extra: dict[str, object]) -> None:
    """Signed with that very key; and nothing is fetched, opened or resolved to find out."""
    text = token(header(**extra), key=OTHER_KEY)
    with sealed():
        assert MALFORMED is refusal(text)


def test_j05_the_seal_sees_files_sockets_and_look_ups() -> None:
    """The guard of these tests fires when it should, so its silence means something."""
    import socket  # noqa: PLC0415 - needed for this proof alone
    from pathlib import Path  # noqa: PLC0415

    for reach in (lambda: Path("/etc/hostname").read_text(), socket.socket, lambda: socket.getaddrinfo("localhost", 1)):
        with pytest.raises(ReachedOutsideError), sealed():
            reach()


@pytest.mark.parametrize(
    ("kid", "expected"),
    [
        ("../../dev/null", MALFORMED),
        ("/etc/passwd", MALFORMED),
        ("k1' OR '1'='1", MALFORMED),
        ("k1\x00", MALFORMED),
        (JWK.kid + "\x00", MALFORMED),
        (JWK.kid + "=", MALFORMED),
        (JWK.kid + "\n", MALFORMED),
        (" " + JWK.kid, MALFORMED),
        (JWK.kid[:-1], MALFORMED),
        ("k" * 700, MALFORMED),
        pytest.param("k" * 10_240, MALFORMED, id="10-kib"),
        ("", MALFORMED),
        (None, MALFORMED),
        (7, MALFORMED),
        (True, MALFORMED),
        ([JWK.kid], MALFORMED),
        ({"kid": JWK.kid}, MALFORMED),
        (..., MALFORMED),
        (other_case(JWK.kid), UNKNOWN_KEY),
        (OTHER_JWK.kid, UNKNOWN_KEY),
        ("A" * 43, UNKNOWN_KEY),
    ],
)
def test_j06_a_kid_is_a_name_in_the_key_set_and_nothing_else(kid: object, expected: InvalidTokenReason) -> None:
    """No path, no query, no guess: one look-up in memory, of a text that has the form of a thumbprint."""
    text = token(header(kid=kid))
    with sealed():
        assert expected is refusal(text)


def test_j06_a_token_of_another_tenant_needs_that_tenants_keys() -> None:
    """The same token passes where its key is published, and nowhere else."""
    theirs = token(header(kid=OTHER_JWK.kid), key=OTHER_KEY)
    assert UNKNOWN_KEY is refusal(theirs)
    assert accept(theirs, keys=KeySet.of([OTHER_JWK]))


def test_j06_the_kid_of_one_key_and_the_signature_of_another_do_not_add_up() -> None:
    """The key is the one that the kid names, also where the other one is published too."""
    both = KeySet.of([JWK, OTHER_JWK])
    assert BAD_SIGNATURE is refusal(token(header(kid=OTHER_JWK.kid), key=KEY), keys=both)
    assert BAD_SIGNATURE is refusal(token(header(kid=JWK.kid), key=OTHER_KEY), keys=both)


def test_j07_a_key_counts_exactly_while_it_is_published() -> None:
    """Published before it signs and until its last token is over: accepted. Removed or revoked: refused at once."""
    text = token()
    assert UNKNOWN_KEY is refusal(text, keys=KeySet.of([OTHER_JWK]))
    assert accept(text, keys=KeySet.of([OTHER_JWK, JWK]))
    assert UNKNOWN_KEY is refusal(text, keys=KeySet.of([OTHER_JWK]))


@pytest.mark.parametrize(
    "crit", [["exp"], ["b64"], [], "exp", ["unknown"], ["kid", "kid"], None, [7], {"exp": 1}, ["http://example.com/x"]]
)
def test_j09_a_critical_extension_is_refused(crit: object) -> None:
    """RFC 7515 section 4.1.11: what must be understood and is not. None is, so the member itself is refused."""
    assert MALFORMED is refusal(token(header(crit=crit)))
    assert MALFORMED is refusal(token(header(crit=crit, exp=1, unknown=1)))


@pytest.mark.parametrize("extra", [{"b64": False}, {"b64": False, "crit": ["b64"]}, {"b64": True}])
def test_j10_an_unencoded_payload_is_refused(extra: dict[str, object]) -> None:
    """RFC 7797, with and without crit, encoded or not."""
    assert MALFORMED is refusal(token(header(**extra)))
    head, signature = base64url(compact(header(**extra))), base64url(bytes(64))
    assert MALFORMED is refusal(head + b"." + compact(payload()) + b"." + signature)


def test_j10_a_detached_payload_is_refused() -> None:
    """RFC 7515 appendix F: the middle is empty, and the content is elsewhere."""
    head, _, signature = token().split(".")
    assert MALFORMED is refusal(f"{head}..{signature}")


def test_j10_a_huge_middle_is_refused_before_it_is_decoded() -> None:
    """CVE-2026-48525."""
    head, _, signature = token(header(b64=False)).split(".")
    assert MALFORMED is refusal(f"{head}.{'A' * 1_000_000}.{signature}")


RIGHT = f'"alg":"ES256","typ":"at+jwt","kid":"{JWK.kid}"'


@pytest.mark.parametrize(
    "head",
    [
        RIGHT + ',"alg":"ES256"',
        RIGHT + ',"alg":"none"',
        '"alg":"none",' + RIGHT,
        RIGHT + f',"kid":"{JWK.kid}"',
        RIGHT + f',"kid":"{OTHER_JWK.kid}"',
        RIGHT + ',"typ":"JWT"',
        RIGHT + r',"a\u006cg":"none"',
        RIGHT.replace("alg", r"a\u006cg"),
        RIGHT + r',"k\u0069d":"x"',
        RIGHT.replace("at+jwt", r"at\u002bjwt"),
    ],
)
def test_j11_j32_a_header_that_two_parsers_may_read_differently_is_refused(head: str) -> None:
    """A member twice, also by another spelling of its name. The signature over it is right."""
    assert MALFORMED is refusal(token(("{" + head + "}").encode()))


@pytest.mark.parametrize(
    "name", ["alg ", " alg", "ALG", "Alg", "al", "", "\N{CYRILLIC SMALL LETTER A}lg", "alg\u200b", "alg\u0000"]
)
def test_j32_a_look_alike_of_a_member_is_refused(name: str) -> None:
    """White space, case and other scripts: beside alg, and in its place."""
    assert MALFORMED is refusal(token(compact(header()).replace(b"}", b"," + compact({name: "none"})[1:])))
    assert refusal(token(header(**{"alg": ..., name: "ES256"}))) in {MALFORMED, BAD_ALGORITHM}


@pytest.mark.parametrize(
    "head",
    [
        b"{ " + RIGHT.encode() + b"}",
        b"{" + RIGHT.replace(",", ", ").encode() + b"}",
        json.dumps(header(), indent=1).encode(),
        compact(dict(sorted(header().items()))),
    ],
)
def test_j32_the_signature_is_over_the_bytes_as_they_came(head: bytes) -> None:
    """A header may be spaced or ordered otherwise, if it was signed like that; not if it was written anew later."""
    other = token(head)
    assert accept(other)
    _, body, signature = token().split(".")
    assert BAD_SIGNATURE is refusal(f"{base64url(head).decode()}.{body}.{signature}")
    assert BAD_SIGNATURE is refusal(token().split(".")[0] + "." + body + "." + other.split(".")[2])


@pytest.mark.parametrize(
    "typ",
    [
        ...,
        None,
        "",
        "JWT",
        "jwt",
        "application/at+jwt",
        "AT+JWT",
        "At+Jwt",
        "at+jwt ",
        "at+jwt;v=1",
        "dpop+jwt",
        "wit+jwt",
        "secevent+jwt",
        "logout+jwt",
        "kb+jwt",
        "jose",
        "at jwt",
        7,
        ["at+jwt"],
        {},
    ],
)
def test_j23_another_type_of_token_is_refused(typ: object) -> None:
    """One spelling. RFC 9068 section 4 would allow the application/ prefix: our issuer never writes it."""
    assert MALFORMED is refusal(token(header(typ=typ)))


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (header(typ="jwk-set+json"), KEYS.to_json().encode()),
        (header(typ="revocations+jwt"), {"iss": "https://tokens.prod.example", "revoked": []}),
        (header(typ="JWT"), payload(cnf=...)),
    ],
    ids=["key-set", "revocations", "join-token"],
)
def test_j24_whatever_else_the_key_signs_is_no_token(head: dict[str, object], body: object) -> None:
    """RFC 8725 section 3.11: types keep what one key signs apart."""
    assert MALFORMED is refusal(token(head, body))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nonce", "zip", "cty", "epk", "enc", "p2c", "iss", "exp", "x"])
def test_any_member_beyond_the_three_is_refused(name: str) -> None:
    """Whatever it would mean: nothing in the header is optional."""
    assert MALFORMED is refusal(token(header(**{name: "DEF"})))


def test_a_header_that_was_seen_before_is_no_reason_to_trust_the_rest() -> None:
    """The parser keeps the headers it has read; the key and the signature are looked up and checked each time."""
    for _ in range(3):
        assert accept(token())
        assert UNKNOWN_KEY is refusal(token(), keys=KeySet.of([OTHER_JWK]))
        assert BAD_SIGNATURE is refusal(token(key=OTHER_KEY))
        assert BAD_ALGORITHM is refusal(token(header(alg="ES257")))
