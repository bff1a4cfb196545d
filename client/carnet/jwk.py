"""Published keys: one public P-256 key as a JWK (RFC 7517), and the set of them that an issuer publishes.

The profile is closed: ES256 signature keys whose `kid` is their own RFC 7638 thumbprint, and not one member more. So a
key cannot be used for another algorithm, two keys cannot share a `kid`, and a private key cannot slip in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from carnet.encoding import base64url, decode_base64url, decode_json_object
from carnet.errors import InvalidKeySetError

__all__ = ["MAX_KEYS", "MAX_KEY_SET_BYTES", "KeySet", "PublicJWK", "is_thumbprint", "thumbprint"]

MAX_KEYS: Final = 100
"""Keys in one set. A keyring holds a handful."""

MAX_KEY_SET_BYTES: Final = 64 * 1024
"""Length of a published set, in bytes."""

_COORDINATE_BYTES: Final = 32
_MEMBERS: Final = frozenset({"kty", "crv", "x", "y", "kid", "use", "alg"})
_FIXED: Final = {"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256"}
_THUMBPRINT: Final = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")


def is_thumbprint(text: object) -> bool:
    """Say whether `text` is a SHA-256 digest in canonical base64url: the form of a `kid` and of ``x5t#S256``."""
    return isinstance(text, str) and _THUMBPRINT.fullmatch(text) is not None


def thumbprint(public_key: PublicKeyTypes) -> str:
    """Return the RFC 7638 thumbprint (SHA-256, base64url) of a P-256 key. Raises `InvalidKeySetError` for others."""
    x, y = _coordinates(_p256(public_key))
    # RFC 7638 section 3.2: the required members only, in this order, with no space. The values need no escape.
    text = f'{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}'
    return base64url(hashlib.sha256(text.encode("ascii")).digest()).decode("ascii")


@dataclass(frozen=True, slots=True)
class PublicJWK:
    """One published key. Two are equal if their `kid` is, for the `kid` is the key's own digest."""

    kid: str
    public_key: ec.EllipticCurvePublicKey = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kid != thumbprint(self.public_key):
            msg = f"kid {_shown(self.kid)} is not the RFC 7638 thumbprint of its key"
            raise InvalidKeySetError(msg)

    @classmethod
    def of(cls, public_key: PublicKeyTypes) -> PublicJWK:
        """Return the JWK of `public_key`. Raises `InvalidKeySetError` if that is not a P-256 key."""
        return cls(thumbprint(public_key), _p256(public_key))

    @classmethod
    def parse(cls, members: Mapping[str, Any]) -> PublicJWK:
        """Return the key that `members` describe: exactly those of `to_dict`. Raises `InvalidKeySetError`."""
        if members.keys() != _MEMBERS:
            # Only names are shown: the value of a member that should not be there may be a private key.
            msg = f"a key has the members {_names(members)} where exactly {_names(_MEMBERS)} are required"
            raise InvalidKeySetError(msg)
        for name, wanted in _FIXED.items():
            if members[name] != wanted:
                msg = f"a key has {name} {_shown(members[name])} where {wanted!r} is required"
                raise InvalidKeySetError(msg)
        if not is_thumbprint(members["kid"]):
            msg = f"a key has kid {_shown(members['kid'])}, which is not a SHA-256 thumbprint in base64url"
            raise InvalidKeySetError(msg)
        x, y = _parse_coordinate("x", members["x"]), _parse_coordinate("y", members["y"])
        try:
            public_key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
        except ValueError:
            msg = f"key {members['kid']} is not a point of P-256"
            raise InvalidKeySetError(msg) from None
        return cls(members["kid"], public_key)

    def to_dict(self) -> dict[str, str]:
        """Return the members of the JWK."""
        x, y = _coordinates(self.public_key)
        return {"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": self.kid, "use": "sig", "alg": "ES256"}


@dataclass(frozen=True, slots=True)
class KeySet:
    """The keys that one issuer publishes, by `kid`. Never empty: a set without keys is a fault, not an answer."""

    keys: Mapping[str, PublicJWK]

    def __post_init__(self) -> None:
        if not 0 < len(self.keys) <= MAX_KEYS:
            msg = f"a key set holds 1 to {MAX_KEYS} keys, and this one {len(self.keys)}"
            raise InvalidKeySetError(msg)
        if any(kid != key.kid for kid, key in self.keys.items()):
            msg = "a key set names a key by another kid than its own"
            raise InvalidKeySetError(msg)
        object.__setattr__(self, "keys", MappingProxyType(dict(sorted(self.keys.items()))))

    @classmethod
    def of(cls, keys: Iterable[PublicJWK]) -> KeySet:
        """Return the set of `keys`. Raises `InvalidKeySetError` for none, too many, or one twice."""
        by_kid: dict[str, PublicJWK] = {}
        for key in keys:
            if key.kid in by_kid:
                msg = f"the key set holds kid {key.kid} twice"
                raise InvalidKeySetError(msg)
            by_kid[key.kid] = key
        return cls(by_kid)

    @classmethod
    def parse(cls, text: str | bytes) -> KeySet:
        """Return the JWK set (RFC 7517 section 5) that `text` is, or raise `InvalidKeySetError`.

        One key that breaks the rules refuses the whole set: it did not come from a broker of Carnet.
        """
        if len(text) > MAX_KEY_SET_BYTES:  # Signs of a str are bytes here: only ASCII passes below.
            msg = f"the key set is longer than {MAX_KEY_SET_BYTES} bytes"
            raise InvalidKeySetError(msg)
        if not text.isascii():
            msg = "the key set is not ASCII"
            raise InvalidKeySetError(msg)
        raw = text.encode("ascii") if isinstance(text, str) else text
        try:
            document = decode_json_object(raw.strip(b" \t\n\r"), max_containers=MAX_KEYS + 2)
        except ValueError as error:
            msg = f"the key set {error}"
            raise InvalidKeySetError(msg) from None
        keys = document.get("keys")
        if document.keys() != {"keys"} or not isinstance(keys, list) or not all(isinstance(k, dict) for k in keys):
            msg = "the key set is not one member 'keys' with a list of objects"
            raise InvalidKeySetError(msg)
        return cls.of(map(PublicJWK.parse, keys))

    def to_json(self) -> str:
        """Return the set as a JWK set, ordered by `kid`."""
        return json.dumps({"keys": [key.to_dict() for key in self.keys.values()]}, separators=(",", ":"))

    def get(self, kid: str) -> PublicJWK | None:
        """Return the key with this `kid`, None where the set has none. A look-up in a dict, and nothing else."""
        return self.keys.get(kid)


def _p256(public_key: PublicKeyTypes) -> ec.EllipticCurvePublicKey:
    if isinstance(public_key, ec.EllipticCurvePublicKey) and isinstance(public_key.curve, ec.SECP256R1):
        return public_key
    msg = "the key is not an elliptic curve key on P-256"
    raise InvalidKeySetError(msg)


def _coordinates(public_key: ec.EllipticCurvePublicKey) -> tuple[str, str]:
    """Return x and y in base64url, each 32 bytes with leading zeros kept (RFC 7518 section 6.2.1)."""
    numbers = public_key.public_numbers()
    x, y = (base64url(n.to_bytes(_COORDINATE_BYTES, "big")).decode("ascii") for n in (numbers.x, numbers.y))
    return x, y


def _parse_coordinate(name: str, text: object) -> int:
    if not is_thumbprint(text):  # The same form: 32 bytes in canonical base64url.
        msg = f"a key has a {name} that is not {_COORDINATE_BYTES} bytes in canonical base64url"
        raise InvalidKeySetError(msg)
    return int.from_bytes(decode_base64url(str(text).encode("ascii")), "big")


def _names(members: Iterable[object]) -> str:
    return ", ".join(sorted(str(name)[:20] for name in members)[:12]) or "(none)"


def _shown(value: object) -> str:
    return repr(value[:50]) if isinstance(value, str) else f"of type {type(value).__name__}"
