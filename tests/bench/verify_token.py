"""What it costs to verify one token, and where it goes. Run in ``tests/``: ``python -m bench.verify_token``.

Prints one JSON object, in microseconds. The ways are measured in turn, so that a busy moment meets all of them, and of
each the least and the median are given. The rows with revocations do what a verifier does for a call: verify the token,
and ask the set whether it is revoked. ``ratio`` is that of each of them to the one with an empty set.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from carnet.claims import claims_of_payload
from carnet.revocations import Revocation, RevocationKind, RevocationSet
from carnet.verify import check_claims, encode_unsigned, parse_unverified, raw_signature, verify_signature
from support.second_opinion import SecondOpinion
from support.tokens import EXPECTED, JWK, KEY, KEYS, PEER, accept, payload, seconds, token

ROUNDS, CALLS = 40, 200
REVOCATIONS = 100_000
NONE, MANY = "carnet, 0 revocations", f"carnet, {REVOCATIONS} revocations"


def revocations(now: datetime, count: int) -> RevocationSet:
    """Return a set of that many revoked tokens."""
    ends = now.replace(microsecond=0) + timedelta(hours=1)
    return RevocationSet(
        Revocation(number, RevocationKind.TOKEN, f"{number:022d}", 0, ends) for number in range(1, count + 1)
    )


def verified(text: str, revoked: RevocationSet, now: datetime) -> None:
    """Verify a token that is not revoked."""
    assert revoked.refusal(accept(text, now=now)) is None


def ways() -> dict[str, Callable[[], object]]:
    """Return what is measured: our verifier whole and in parts, and the others on the same token."""
    now = datetime.now(UTC)
    start = seconds(now)
    text = token(None, payload(iat=start, nbf=start, exp=start + 300))
    parts = parse_unverified(text)
    claims = claims_of_payload(parts.unverified_payload)
    others = SecondOpinion(KEYS)
    es256 = ec.ECDSA(SHA256())
    none, many = revocations(now, 0), revocations(now, REVOCATIONS)
    return {
        "carnet": lambda: accept(text, now=now),
        NONE: lambda: verified(text, none, now),
        MANY: lambda: verified(text, many, now),
        "part: parse": lambda: parse_unverified(text),
        "part: signature": lambda: verify_signature(JWK, parts.signing_input, parts.signature),
        "part: claims": lambda: claims_of_payload(parts.unverified_payload),
        "part: checks": lambda: check_claims(claims, expectations=EXPECTED, peer_thumbprint=PEER, now=now),
        "PyJWT": lambda: others.pyjwt_accepts(text, leeway=0),
        "joserfc": lambda: others.joserfc_accepts(text, leeway=0, now=now),
        "write: encode": lambda: encode_unsigned(claims, JWK.kid),
        "write: sign": lambda: raw_signature(KEY.sign(parts.signing_input, es256)),
    }


def measure() -> dict[str, dict[str, float]]:
    """Return the least and the median of many rounds for each way, in microseconds."""
    measured = ways()
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(ROUNDS):
        for name, call in measured.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    return {
        name: {"least": round(min(taken), 1), "median": round(statistics.median(taken), 1)}
        for name, taken in times.items()
    }


if __name__ == "__main__":
    versions = {name: version(name) for name in ("cryptography", "PyJWT", "joserfc")}
    figures = measure()
    ratio = {how: round(figures[MANY][how] / figures[NONE][how], 3) for how in figures[NONE]}
    content = {"python": platform.python_version(), **versions, "microseconds": figures, "ratio": ratio}
    print(json.dumps(content, indent=1))
