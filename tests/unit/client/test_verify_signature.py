from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from carnet.encoding import decode_base64url
from carnet.errors import InvalidTokenError, InvalidTokenReason
from carnet.jwk import PublicJWK
from carnet.verify import SIGNATURE_BYTES, parse_unverified, raw_signature, verify_signature
from support.tokens import JWK, KEY, OTHER_JWK, accept, payload, refusal, sign, split, token

BAD_SIGNATURE, MALFORMED = InvalidTokenReason.BAD_SIGNATURE, InvalidTokenReason.MALFORMED

P = 2**256 - 2**224 + 2**192 + 2**96 - 1
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
EDGES = {"0": 0, "1": 1, "n-1": N - 1, "n": N, "n+1": N + 1, "p": P, "p+1": P + 1, "max": 2**256 - 1}

# RFC 7515 appendix A.3.
RFC_7515_X = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU"
RFC_7515_Y = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"
RFC_7515_TOKEN = (
    b"eyJhbGciOiJFUzI1NiJ9"
    b".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
    b".DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
)


def numbers(signature: bytes) -> tuple[int, int]:
    """Return r and s."""
    return int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")


def signature(r: int, s: int) -> bytes:
    """Return r and s as 64 bytes."""
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def other_form(text: str) -> str:
    """Return the token with the second form of its signature (r, n - s)."""
    r, s = numbers(split(text)[2])
    return token(signature=signature(r, N - s))


def root(x: int) -> int:
    """Return the y of the point with this x, 0 where there is none."""
    square = (x**3 - 3 * x + B) % P
    y = pow(square, (P + 1) // 4, P)
    return y if y * y % P == square else 0


def add(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Return the sum of two points that are not each other's opposite."""
    (x, y), (u, v) = one, other
    slope = (3 * x * x - 3) * pow(2 * y, -1, P) if one == other else (v - y) * pow(u - x, -1, P)
    sum_x = (slope * slope - x - u) % P
    return sum_x, (slope * (x - sum_x) - y) % P


def times(scalar: int, point: tuple[int, int]) -> tuple[int, int]:
    """Return `point` added to itself `scalar` times."""
    result = None
    for bit in f"{scalar % N:b}":
        result = add(result, result) if result else None
        if bit == "1":
            result = add(result, point) if result else point
    assert result is not None
    return result


def key_for(signing_input: bytes, point: tuple[int, int], s: int) -> PublicJWK:
    """Return the key under which (x of `point`, `s`) is a signature: Q = (s R - e G) / r (SEC 1 section 4.1.6)."""
    digest = int.from_bytes(hashlib.sha256(signing_input).digest(), "big")
    generator = ec.derive_private_key(1, ec.SECP256R1()).public_key().public_numbers()
    difference = add(times(s, point), times(-digest, (generator.x, generator.y)))
    x, y = times(pow(point[0], -1, N), difference)
    return PublicJWK.of(ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key())


def test_the_signature_of_rfc_7515_is_right() -> None:
    """Appendix A.3.1: the RFC's own key, input and signature."""
    x, y = (int.from_bytes(decode_base64url(c.encode()), "big") for c in (RFC_7515_X, RFC_7515_Y))
    key = PublicJWK.of(ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key())
    signing_input, _, encoded = RFC_7515_TOKEN.rpartition(b".")
    verify_signature(key, signing_input, decode_base64url(encoded))
    with pytest.raises(InvalidTokenError):
        verify_signature(key, signing_input + b"A", decode_base64url(encoded))
    with pytest.raises(InvalidTokenError):
        verify_signature(JWK, signing_input, decode_base64url(encoded))


def test_a_right_signature_on_a_foreign_document_makes_no_token() -> None:
    """The RFC's example has neither typ nor kid."""
    assert MALFORMED is refusal(RFC_7515_TOKEN)


@pytest.mark.parametrize("r", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("s", EDGES.values(), ids=EDGES)
def test_j16_r_and_s_at_the_edges_are_refused(r: int, s: int) -> None:
    """CVE-2022-21449 and its kin: zero, one, the order of the curve, the field's prime, and their neighbours."""
    assert BAD_SIGNATURE is refusal(token(signature=signature(r, s)))


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES)
def test_j16_one_right_half_does_not_help(edge: int) -> None:
    """r of the right signature with any s, and the reverse."""
    r, s = numbers(split(token())[2])
    assert BAD_SIGNATURE is refusal(token(signature=signature(edge, s)))
    assert BAD_SIGNATURE is refusal(token(signature=signature(r, edge)))


def test_j16_numbers_that_differ_by_the_order_are_not_the_same() -> None:
    """r + n and s + n would verify if they were reduced first. Both fit 32 bytes only where r and s are small.

    Such signatures do not happen by chance, so the key is made to fit one.
    """
    r, y = next((x, y) for x in range(1, 100) if (y := root(x)))
    s = 3
    key = key_for(b"input", (r, y), s)
    verify_signature(key, b"input", signature(r, s))
    for wrong in ((r + N, s), (r, s + N), (r + N, s + N)):
        with pytest.raises(InvalidTokenError):
            verify_signature(key, b"input", signature(*wrong))


@pytest.mark.parametrize("swap", ["s-r", "n-r", "zero-s", "zero-r"])
def test_j16_right_numbers_in_wrong_places_are_refused(swap: str) -> None:
    """The halves swapped, the other one negated, one of them gone."""
    r, s = numbers(split(token())[2])
    wrong = {"s-r": (s, r), "n-r": (N - r, s), "zero-s": (r, 0), "zero-r": (0, s)}[swap]
    assert BAD_SIGNATURE is refusal(token(signature=signature(*wrong)))


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: encode_dss_signature(*numbers(raw)),
        lambda raw: raw[:-1],
        lambda raw: raw[1:],
        lambda raw: raw + b"\0",
        lambda raw: b"\0" + raw,
        lambda raw: b"\0" + raw[:32] + b"\0" + raw[32:],
        lambda raw: raw + raw,
        lambda _: b"\0",
    ],
    ids=["der", "63-end", "63-start", "65-end", "65-start", "66", "128", "1"],
)
def test_j16_a_signature_in_another_form_is_refused(change: object) -> None:
    """DER, cut, padded: RFC 7518 section 3.4 has one form, of 64 bytes."""
    wrong = change(split(token())[2])  # type: ignore[operator]
    assert MALFORMED is refusal(token(signature=wrong))
    with pytest.raises(InvalidTokenError) as caught:
        verify_signature(JWK, parse_unverified(token()).signing_input, wrong)
    assert BAD_SIGNATURE is caught.value.reason


def test_j16_the_second_form_of_a_signature_is_the_same_token() -> None:
    """ECDSA accepts (r, n - s) as well, and so do all libraries.

    It does no harm while nothing is keyed on the text of a token: both forms carry the same ``jti``, so a revocation
    of it meets both.
    """
    first, second = token(), other_form(token())
    assert first != second
    assert accept(first) == accept(second)
    assert payload()["jti"] == accept(second).token_id


def test_j16_a_signature_with_leading_zeros_is_right() -> None:
    """One in 128 has them: a verifier that drops or demands them fails now and then."""
    for zero in (0, 32):
        signing_input = next(b"%d" % n for n in range(5000) if sign(b"%d" % n)[zero] == 0)
        verify_signature(JWK, signing_input, sign(signing_input))


def test_signatures_are_made_anew_each_time_and_all_are_right() -> None:
    """Not only the deterministic ones of these tests."""
    made = {raw_signature(KEY.sign(b"input", ec.ECDSA(SHA256()))) for _ in range(5)}
    assert 5 == len(made)
    for raw in made:
        assert SIGNATURE_BYTES == len(raw)
        verify_signature(JWK, b"input", raw)


def test_a_signature_counts_for_its_key_and_its_input() -> None:
    """The error names the key, and nothing else."""
    for key, signing_input in ((OTHER_JWK, b"input"), (JWK, b"inpuT"), (JWK, b"")):
        with pytest.raises(InvalidTokenError, match=f"not one of key {key.kid}"):
            verify_signature(key, signing_input, sign(b"input"))


@pytest.mark.parametrize("der", [b"", b"0", b"\x30\x06\x02\x01\x01\x02\x01", b"\x30\x06\x02\x01\x01\x02\x01\x01\x00"])
def test_what_is_no_der_has_no_raw_form(der: bytes) -> None:
    """An answer of a key store that is no signature does not become one."""
    with pytest.raises(ValueError, match=r".+"):
        raw_signature(der)
