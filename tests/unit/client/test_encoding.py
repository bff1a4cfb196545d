from __future__ import annotations

import pytest

from carnet.encoding import base64url, decode_base64url, decode_json_object, encode_json

ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def decode(raw: bytes, *, max_containers: int = 4) -> dict[str, object]:
    """Decode with room for four objects and lists."""
    return decode_json_object(raw, max_containers=max_containers)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", b""),
        (b"\x03\xec\xff\xe0\xc1", b"A-z_4ME"),  # RFC 7515 appendix C.
        (b"\xfb\xff", b"-_8"),
        (bytes(3), b"AAAA"),
    ],
)
def test_base64url_is_written_and_read_as_in_rfc_7515(raw: bytes, text: bytes) -> None:
    """Both directions agree with the RFC's own example, and with its URL-safe alphabet."""
    assert text == base64url(raw)
    assert raw == decode_base64url(text)


@pytest.mark.parametrize("length", range(1, 8))
def test_j12_of_all_last_signs_only_those_with_zero_unused_bits_are_read(length: int) -> None:
    """RFC 4648 section 3.5: one byte string has one spelling, so the bits that say nothing are zero."""
    read = [last for last in ALPHABET if _is_read(b"A" * (length - 1) + bytes([last]))]
    assert {0: 64, 1: 0, 2: 4, 3: 16}[length % 4] == len(read)


@pytest.mark.parametrize(
    "text",
    [
        b"QUI=",
        b"QQ==",
        b"=",
        b"QUJD=",
        b"QUJD====",
        b"+_8A",
        b"-/8A",
        b"QU JD",
        b" QUJD",
        b"QUJD\n",
        b"QU\nJD",
        b"QU?JD",
        b"Q\x00UJ",
        b"\xc3\xa9A",
        b"QU=JD",
        b"....",
        b"Q",
    ],
)
def test_j12_whatever_a_lenient_reader_skips_is_refused(text: bytes) -> None:
    """Padding, the other alphabet, white space and foreign signs do not pass."""
    with pytest.raises(ValueError, match="base64url"):
        decode_base64url(text)


def test_json_is_written_without_space_in_the_order_given() -> None:
    """The writer is what the strict reader reads back."""
    raw = encode_json({"b": 1, "a": {"c": "d e"}})
    assert b'{"b":1,"a":{"c":"d e"}}' == raw
    assert {"b": 1, "a": {"c": "d e"}} == decode(raw)


def test_numbers_that_are_none_are_not_written() -> None:
    """NaN is no JSON, whatever Python's own writer does by default."""
    with pytest.raises(ValueError, match="JSON"):
        encode_json({"a": float("nan")})


def test_white_space_between_the_parts_is_json() -> None:
    """A key set that somebody formatted is still readable."""
    assert {"a": [1, {}]} == decode(b'{\t"a" :\r\n [1, {}]\n}')


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" {}",
        b"{} ",
        b"{}\n",
        b"\xef\xbb\xbf{}",
        b"[]",
        b'"a"',
        b"1",
        b"null",
        b"true",
        b"{}{}",
        b"{}x",
        b"x{}",
        b"{",
        b"}",
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b"{'a':1}",
        b'{"a":1 "b":2}',
        b"{a:1}",
        b"{/**/}",
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":0x1}',
        b'{"a":"b}',
    ],
)
def test_j15_what_is_not_exactly_one_object_is_refused(raw: bytes) -> None:
    """No other top level, nothing before, nothing behind, and no looser dialect."""
    with pytest.raises(ValueError, match=r".+"):
        decode(raw)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_j15_other_encodings_are_refused(encoding: str) -> None:
    """The standard library guesses the encoding of JSON; a token has one."""
    with pytest.raises(ValueError, match=r"one JSON object|printable ASCII"):
        decode('{"a":1}'.encode(encoding))


@pytest.mark.parametrize(
    "content",
    [
        b"\xc3\xa9",
        b"\xff",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\x00",
        b"\x1f",
        b"\x7f",
        b"\\u0000",
        b"\\ud800",
        b"\\n",
        b"\\u0061",
        b"\\/",
        b"\\",
        "\N{GREEK SMALL LETTER ALPHA}".encode(),
    ],
)
def test_j15_signs_outside_printable_ascii_and_escapes_are_refused(content: bytes) -> None:
    """Invalid and overlong UTF-8, surrogates, NUL, control signs, look-alikes and escapes have no place in a token."""
    for raw in (b'{"a":"x' + content + b'"}', b'{"x' + content + b'":1}'):
        with pytest.raises(ValueError, match="printable ASCII"):
            decode(raw)


@pytest.mark.parametrize("sign", [b"\t", b"\n", b"\r"])
def test_j15_white_space_that_json_has_between_parts_is_refused_inside_a_text(sign: bytes) -> None:
    """RFC 8259 section 7: control signs inside a string are no JSON."""
    with pytest.raises(ValueError, match="control character"):
        decode(b'{"a":"x' + sign + b'"}')


@pytest.mark.parametrize("raw", [b'{"a":1,"a":1}', b'{"b":{"a":1,"a":2}}', b'{"b":[{"a":1,"a":2}]}', b'{"":1,"":1}'])
def test_j11_a_member_that_stands_twice_is_refused_at_every_depth(raw: bytes) -> None:
    """Which of two members counts is not for a parser to choose, not even if both say the same."""
    with pytest.raises(ValueError, match="twice"):
        decode(raw)


@pytest.mark.parametrize("number", [b"0", b"1", b"9999999999999999"])
def test_whole_numbers_are_read(number: bytes) -> None:
    """Up to 16 digits."""
    assert {"a": int(number)} == decode(b'{"a":' + number + b"}")


@pytest.mark.parametrize(
    "number",
    [
        b"-1",
        b"-0",
        b"10000000000000000",
        b"1" * 5000,
        b"1.5",
        b"1.0",
        b"1e2",
        b"1E400",
        b"NaN",
        b"Infinity",
        b"-Infinity",
    ],
)
def test_j18_numbers_that_are_not_whole_or_too_long_are_refused(number: bytes) -> None:
    """No fraction, no exponent, no sign, no name; and a long one is refused before it is converted."""
    with pytest.raises(ValueError, match="number"):
        decode(b'{"a":' + number + b"}")


def test_j14_nesting_is_bounded_before_it_is_parsed() -> None:
    """As many objects and lists as are allowed pass, one more does not, and depth cannot exhaust the stack."""
    assert {"a": [[[]]]} == decode(b'{"a":[[[]]]}', max_containers=4)
    with pytest.raises(ValueError, match="more than 3 objects and lists"):
        decode(b'{"a":[[[]]]}', max_containers=3)
    with pytest.raises(ValueError, match="more than 4 objects and lists"):
        decode(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def test_an_error_says_nothing_of_the_text() -> None:
    """What could not be read may be half a secret; the error does not repeat it."""
    for raw in (
        b'{"secret-name":1,"secret-name":1}',
        b'{"a":"secret-name"',
        b'{"a":"secret-name\xff"}',
        b'{"a":secret}',
    ):
        with pytest.raises(ValueError, match=r".+") as caught:
            decode(raw)
        assert "secret" not in str(caught.value)


def _is_read(text: bytes) -> bool:
    try:
        decode_base64url(text)
    except ValueError:
        return False
    return True
