"""Writes tokens.json: tokens with what a verifier must say of them, for this project and for others.

Run in ``tests/``: ``python -m vectors.generate``. The result depends on this file alone: key and time are fixed, and
the signatures are deterministic (RFC 6979). A test compares it with what is committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from carnet.encoding import base64url
from carnet.errors import InvalidTokenReason as Reason
from carnet.verify import MAX_TOKEN_BYTES
from support.tokens import (
    AUDIENCE,
    ISSUER,
    KEYS,
    LIFE,
    NOW,
    OTHER_JWK,
    OTHER_KEY,
    OTHER_PEER,
    PEER,
    compact,
    header,
    payload,
    seconds,
    split,
    token,
)

FILE: Final = Path(__file__).with_name("tokens.json")
ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

ABOUT: Final = (
    "Every vector is a token with the answer of a verifier that trusts key_set and expects issuer and audience, at the"
    " time now, on a connection whose client certificate has peer_thumbprint (null: none is known), with binding"
    " 'certificate' (bound tokens only) or 'none'. A vector may replace now, peer_thumbprint and binding for itself."
    " result is 'accepted' or 'refused'; a refused one has a reason."
)

Vector = dict[str, Any]


def accepted(name: str, text: str, **replaced: str | None) -> Vector:
    """Return a vector that passes."""
    return {"id": name, "token": text, "result": "accepted", **replaced}


def refused(name: str, reason: Reason, text: str, **replaced: str | None) -> Vector:
    """Return a vector that does not pass."""
    return {"id": name, "token": text, "result": "refused", "reason": reason.value, **replaced}


def moment(offset: timedelta) -> str:
    """Return the time so long after NOW."""
    return (NOW + offset).isoformat().replace("+00:00", "Z")


def good() -> Iterator[Vector]:
    """Yield what every verifier must accept."""
    head, body, signature = split(token())
    second_form = signature[:32] + (ORDER - int.from_bytes(signature[32:], "big")).to_bytes(32, "big")
    last, first = timedelta(seconds=-1), timedelta(seconds=-30)
    yield accepted("right", token())
    yield accepted("unbound-where-allowed", token(None, payload(cnf=...)), binding="none", peer_thumbprint=None)
    yield accepted("bound-where-not-required", token(), binding="none")
    yield accepted("bound-where-the-peer-is-unknown", token(), binding="none", peer_thumbprint=None)
    yield accepted("members-in-another-order", token(compact(dict(sorted(header().items())))))
    yield accepted("space-between-members", token(json.dumps(header()).encode(), json.dumps(payload()).encode()))
    yield accepted("J16-second-form-of-the-signature", token(head, body, signature=second_form))
    yield accepted("J19-last-second", token(), now=moment(LIFE + last))
    yield accepted("J19-nbf-and-iat-at-the-leeway", token(), now=moment(first))
    yield accepted("J18-longest-life", token(None, payload(exp=seconds(NOW) + 86_400)))


def wrong_header() -> Iterator[Vector]:
    """Yield rows J01 to J11, J23 and J32 as far as they are about the header."""
    head, body, signature = token().split(".")
    right = compact(header())
    yield refused("J01-alg-none", Reason.BAD_ALGORITHM, token(header(alg="none")))
    yield refused("J01-alg-none-unsigned", Reason.MALFORMED, token(header(alg="none"), signature=b""))
    yield refused("J01-alg-missing", Reason.BAD_ALGORITHM, token(header(alg=...)))
    yield refused("J02-alg-HS256", Reason.BAD_ALGORITHM, token(header(alg="HS256"), signature=bytes(32)))
    yield refused("J03-alg-ES384", Reason.BAD_ALGORITHM, token(header(alg="ES384")))
    yield refused("J03-alg-lower-case", Reason.BAD_ALGORITHM, token(header(alg="es256")))
    yield refused("J04-signed-by-another-key", Reason.BAD_SIGNATURE, token(key=OTHER_KEY))
    yield refused("J05-jwk", Reason.MALFORMED, token(header(jwk=OTHER_JWK.to_dict()), key=OTHER_KEY))
    yield refused("J05-jku", Reason.MALFORMED, token(header(jku="https://evil.example/jwks")))
    yield refused("J06-kid-path", Reason.MALFORMED, token(header(kid="../../dev/null")))
    yield refused("J06-kid-missing", Reason.MALFORMED, token(header(kid=...)))
    yield refused("J06-kid-unknown", Reason.UNKNOWN_KEY, token(header(kid=OTHER_JWK.kid), key=OTHER_KEY))
    yield refused("J09-crit", Reason.MALFORMED, token(header(crit=["exp"])))
    yield refused("J09-crit-empty", Reason.MALFORMED, token(header(crit=[])))
    yield refused("J10-b64-false", Reason.MALFORMED, token(header(b64=False, crit=["b64"])))
    yield refused("J10-detached", Reason.MALFORMED, f"{head}..{signature}")
    yield refused("J11-alg-twice", Reason.MALFORMED, token(right[:-1] + b',"alg":"ES256"}'))
    yield refused("J11-alg-twice-by-escape", Reason.MALFORMED, token(right[:-1] + rb',"a\u006cg":"none"}'))
    yield refused("J23-typ-JWT", Reason.MALFORMED, token(header(typ="JWT")))
    yield refused("J23-typ-upper-case", Reason.MALFORMED, token(header(typ="AT+JWT")))
    yield refused("J23-typ-application", Reason.MALFORMED, token(header(typ="application/at+jwt")))
    yield refused("J23-typ-missing", Reason.MALFORMED, token(header(typ=...)))
    spaced = base64url(right.replace(b",", b", ")).decode()
    yield refused("J32-header-written-anew", Reason.BAD_SIGNATURE, f"{spaced}.{body}.{signature}")


def wrong_form() -> Iterator[Vector]:
    """Yield rows J11 to J16 as far as they are about the form."""
    head, body, signature = token().split(".")
    raw, plain = split(token())[2], compact(payload())
    yield refused("J11-exp-twice", Reason.MALFORMED, token(None, plain[:-1] + b',"exp":4102444800}'))
    yield refused("J11-x5t-twice", Reason.MALFORMED, token(None, plain[:-2] + b',"x5t#S256":"A"}}'))
    yield refused("J12-padded", Reason.MALFORMED, token() + "==")
    unused = signature[:-1] + chr(ord(signature[-1]) + 1)
    yield refused("J12-unused-bits", Reason.MALFORMED, f"{head}.{body}.{unused}")
    yield refused("J12-newline-behind", Reason.MALFORMED, token() + "\n")
    yield refused("J12-two-parts", Reason.MALFORMED, f"{head}.{body}")
    yield refused("J12-four-parts", Reason.MALFORMED, token() + ".")
    yield refused("J13-jwe", Reason.MALFORMED, f"{head}..{body}.{body}.{signature}")
    flattened = compact({"protected": head, "payload": body, "signature": signature}).decode()
    yield refused("J13-json-serialisation", Reason.MALFORMED, flattened)
    filled = plain.replace(b"{", b"{" + b" " * MAX_TOKEN_BYTES, 1)
    yield refused("J14-too-long", Reason.MALFORMED, token(None, filled))
    yield refused("J14-nested", Reason.MALFORMED, token(None, b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}"))
    yield refused("J15-byte-order-mark", Reason.MALFORMED, token(None, b"\xef\xbb\xbf" + plain))
    yield refused("J15-utf-16", Reason.MALFORMED, token(None, plain.decode().encode("utf-16-le")))
    yield refused("J15-lone-surrogate", Reason.MALFORMED, token(None, plain.replace(b"charge", rb"\ud800")))
    yield refused("J15-trailing-space", Reason.MALFORMED, token(None, plain + b" "))
    yield refused("J15-list", Reason.MALFORMED, token(None, b"[" + plain + b"]"))
    yield refused("J16-zeros", Reason.BAD_SIGNATURE, token(signature=bytes(64)))
    yield refused("J16-r-is-n", Reason.BAD_SIGNATURE, token(signature=ORDER.to_bytes(32, "big") + raw[32:]))
    yield refused("J16-s-is-n", Reason.BAD_SIGNATURE, token(signature=raw[:32] + ORDER.to_bytes(32, "big")))
    yield refused("J16-63-bytes", Reason.MALFORMED, token(signature=raw[:-1]))
    yield refused("J16-65-bytes", Reason.MALFORMED, token(signature=b"\0" + raw))


def wrong_claims() -> Iterator[Vector]:
    """Yield rows J18 to J28."""
    now = seconds(NOW)

    def body(reason: Reason, name: str, **changes: object) -> Vector:
        return refused(name, reason, token(None, payload(**changes)))

    for claim in payload():
        yield body(Reason.MISSING_CLAIM, f"missing-{claim}", **{claim: ...})
    yield body(Reason.INVALID_CLAIM, "J18-exp-text", exp=str(now + 300))
    yield body(Reason.MALFORMED, "J18-exp-fraction", exp=now + 300.5)
    yield body(Reason.MALFORMED, "J18-exp-2^63", exp=2**63)
    yield body(Reason.INVALID_CLAIM, "J18-exp-true", exp=True)
    yield body(Reason.INVALID_CLAIM, "J18-life-over-a-day", exp=now + 86_401)
    yield refused("J19-exp-is-now", Reason.EXPIRED, token(), now=moment(LIFE))
    yield refused("J19-over-the-leeway", Reason.NOT_YET_VALID, token(), now=moment(timedelta(seconds=-31)))
    yield body(Reason.INVALID_CLAIM, "J19-iat-after-exp", iat=now + 301)
    yield body(Reason.INVALID_CLAIM, "J19-nbf-after-exp", nbf=now + 301)
    yield body(Reason.WRONG_AUDIENCE, "J20-aud-prefix", aud="payments-eu")
    yield body(Reason.WRONG_AUDIENCE, "J20-aud-upper-case", aud="PAYMENTS")
    yield body(Reason.INVALID_CLAIM, "J20-aud-list-of-one", aud=[AUDIENCE])
    yield body(Reason.INVALID_CLAIM, "J20-aud-list-of-two", aud=[AUDIENCE, "bank"])
    yield body(Reason.WRONG_ISSUER, "J21-iss-slash", iss=ISSUER + "/")
    yield body(Reason.WRONG_ISSUER, "J21-J25-iss-staging", iss="https://tokens.staging.example")
    yield body(Reason.INVALID_CLAIM, "J21-iss-list", iss=[ISSUER])
    yield body(Reason.INVALID_CLAIM, "J22-sub-dots", sub="spiffe://prod.example/a/../admin")
    yield body(Reason.INVALID_CLAIM, "J22-sub-percent", sub="spiffe://prod.example/%61")
    yield body(Reason.WRONG_CONFIRMATION, "J26-other-certificate", cnf={"x5t#S256": OTHER_PEER})
    yield refused("J26-other-connection", Reason.WRONG_CONFIRMATION, token(), peer_thumbprint=OTHER_PEER)
    yield refused("J26-no-certificate", Reason.NO_PEER_CERTIFICATE, token(), peer_thumbprint=None)
    other = {"binding": "none", "peer_thumbprint": OTHER_PEER}
    yield refused("J26-other-connection-unbound", Reason.WRONG_CONFIRMATION, token(), **other)
    yield body(Reason.INVALID_CLAIM, "J26-two-methods", cnf={"x5t#S256": PEER, "jkt": PEER})
    yield body(Reason.INVALID_CLAIM, "J26-padded", cnf={"x5t#S256": PEER + "="})
    yield body(Reason.INVALID_CLAIM, "J27-jti-long", jti="a" * 65)
    yield body(Reason.INVALID_CLAIM, "J28-act", act={"sub": "spiffe://prod.example/a"})


def document() -> str:
    """Return the content of tokens.json."""
    content = {
        "about": ABOUT,
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "now": moment(timedelta()),
        "peer_thumbprint": PEER,
        "binding": "certificate",
        "key_set": json.loads(KEYS.to_json()),
        "vectors": [*good(), *wrong_header(), *wrong_form(), *wrong_claims()],
    }
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(document(), encoding="ascii")
