"""The two encodings of JOSE, base64url and JSON, read strictly.

Lenient readers are where two parties start to see different tokens (RFC 8725 sections 2.4 and 3.7). So:

- base64url has exactly one spelling per byte string: no padding, no foreign sign, unused bits zero (RFC 4648
  section 3.5). What does not come back the same when it is encoded again is refused.
- JSON is one object of printable ASCII without escapes. No name and no value of Carnet needs more, and with them go
  byte order marks, other encodings, lone surrogates, NUL, look-alike letters and names hidden behind an escape. A
  member stands once, at every depth. Numbers are whole, not negative and short. The nesting is bounded before it is
  parsed.

Everything here raises `ValueError`, whose text says what is wrong and never repeats the input at length.
"""

from __future__ import annotations

import json
from binascii import Error, a2b_base64, b2a_base64
from typing import Any, Final, NoReturn

__all__ = ["base64url", "decode_base64url", "decode_json_object", "encode_json"]

_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")
_JSON_SIGNS: Final = bytes(sign for sign in range(0x20, 0x7F) if sign != ord("\\")) + b"\t\n\r"
_MAX_DIGITS: Final = 16
"""Enough for 2**53 - 1, and far below what makes `int` slow."""


def base64url(raw: bytes) -> bytes:
    """Return `raw` in base64url without padding (RFC 7515 section 2)."""
    return b2a_base64(raw, newline=False).rstrip(b"=").translate(_TO_URL)


def decode_base64url(text: bytes) -> bytes:
    """Return the bytes that `text` is the one base64url spelling of, or raise `ValueError`."""
    try:
        raw = a2b_base64(text.translate(_FROM_URL) + b"=" * (-len(text) % 4))
    except Error:
        msg = "is not base64url"
        raise ValueError(msg) from None
    if base64url(raw) != text:  # Foreign signs, padding, or unused bits that are not zero: the reader skips them.
        msg = "is not canonical base64url"
        raise ValueError(msg)
    return raw


def encode_json(value: dict[str, Any]) -> bytes:
    """Return `value` as JSON with no space between its parts, members in the order given."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def decode_json_object(raw: bytes, *, max_containers: int) -> dict[str, Any]:
    """Return the one JSON object that `raw` is, or raise `ValueError`.

    `max_containers` bounds how many objects and lists there may be, and with them the depth. The caller bounds the
    length.
    """
    if not (raw.startswith(b"{") and raw.endswith(b"}")):
        msg = "is not one JSON object"
        raise ValueError(msg)
    if raw.translate(None, _JSON_SIGNS):
        msg = "holds a sign outside printable ASCII, or an escape"
        raise ValueError(msg)
    if raw.count(b"{") + raw.count(b"[") > max_containers:
        msg = f"holds more than {max_containers} objects and lists"
        raise ValueError(msg)
    decoded: dict[str, Any] = _DECODER.decode(raw.decode("ascii"))
    return decoded


def _once_each(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what RFC 7515 section 4 lets a parser choose: of two members with one name, the last."""
    decoded = dict(members)
    if len(decoded) != len(members):
        msg = "holds a member twice"
        raise ValueError(msg)
    return decoded


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS or not digits.isdigit():  # Before int(): a long number costs quadratic time.
        msg = f"holds a number that is negative or longer than {_MAX_DIGITS} digits"
        raise ValueError(msg)
    return int(digits)


def _refuse_number(_: str) -> NoReturn:
    msg = "holds a number that is not whole"
    raise ValueError(msg)


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_once_each,
    parse_int=_whole_number,
    parse_float=_refuse_number,
    parse_constant=_refuse_number,
)
