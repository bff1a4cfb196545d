"""Our verifier beside PyJWT and joserfc, over many generated tokens.

Each token is made from a number, so a failure names the numbers that show it again. Half of the tokens are right in
any of the forms that are allowed; each of the others has one fault.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from joserfc import jwt as jose
from joserfc.jwk import ECKey

from carnet.encoding import base64url
from carnet.errors import InvalidTokenError
from carnet.jwk import KeySet
from support.counts import count
from support.measurements import record
from support.second_opinion import SecondOpinion
from support.tokens import AUDIENCE, ISSUER, JWK, KEY, OTHER_JWK, OTHER_KEY, OTHER_PEER, PEER, accept, compact, sign

ALPHABET: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
PLAIN: Final = [chr(sign) for sign in range(0x21, 0x7F) if chr(sign) not in '"\\']
ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
KEYS: Final = KeySet.of([JWK, OTHER_JWK])
OTHERS: Final = SecondOpinion(KEYS)

Members = dict[str, Any]


@dataclass
class Draft:
    """A token in the making. A fault changes one thing of it."""

    rng: random.Random
    head: Members
    body: Members
    key: ec.EllipticCurvePrivateKey = KEY
    rewrite_head: Callable[[bytes], bytes] = bytes
    rewrite_body: Callable[[bytes], bytes] = bytes
    respell: Callable[[str], str] = str

    def text(self) -> str:
        """Write in any order and spacing, sign in either form, assemble."""
        head, body = self.rewrite_head(self._json(self.head)), self.rewrite_body(self._json(self.body))
        signing_input = base64url(head) + b"." + base64url(body)
        signature = sign(signing_input, self.key)
        if self.rng.random() < 0.5:
            s = ORDER - int.from_bytes(signature[32:], "big")
            signature = signature[:32] + s.to_bytes(32, "big")
        return self.respell((signing_input + b"." + base64url(signature)).decode())

    def _json(self, members: Members) -> bytes:
        order = list(members.items())
        self.rng.shuffle(order)
        return json.dumps(dict(order), separators=self.rng.choice([(",", ":"), (", ", ": ")])).encode()


def word(rng: random.Random, signs: str | list[str], least: int, most: int) -> str:
    """Return a text of some of the `signs`."""
    return "".join(rng.choices(signs, k=rng.randint(least, most)))


def spiffe_id(rng: random.Random) -> str:
    """Return a SPIFFE ID."""
    return f"spiffe://{rng.choice(['prod.example', 'a', 'a-b_c.9'])}/" + "/".join(
        word(rng, ALPHABET, 1, 12) for _ in range(rng.randint(1, 5))
    )


def right_draft(rng: random.Random, now: int) -> tuple[Draft, int]:
    """Return a token that is right now and for a minute, and the leeway that it needs."""
    iat, nbf = now + rng.randint(-3600, 30), now + rng.randint(-7200, 30)
    body = {
        "iss": ISSUER,
        "sub": spiffe_id(rng),
        "aud": AUDIENCE,
        "client_id": spiffe_id(rng),
        "exp": now + rng.randint(60, 3600),
        "iat": iat,
        "nbf": nbf,
        "jti": word(rng, ALPHABET, 16, 64),
        "scope": " ".join({word(rng, PLAIN, 1, 9) for _ in range(rng.randint(1, 8))}),
        "rv": rng.randint(0, 2**53 - 1),
        "cnf": {"x5t#S256": PEER},
    }
    head = {"alg": "ES256", "typ": "at+jwt", "kid": JWK.kid}
    return Draft(rng, head, body), 30 if max(iat, nbf) > now else 0


def wrong_member(members: Members, rng: random.Random, wrong: dict[str, list[object]]) -> None:
    """Replace one member by something wrong, or take it out."""
    name = rng.choice(list(wrong))
    value = rng.choice([..., *wrong[name]])
    if value is ...:
        del members[name]
    else:
        members[name] = value


def with_more(raw: bytes, members: Members) -> bytes:
    """Return a JSON object with `members` behind its own."""
    return raw[:-1] + b"," + compact(members)[1:]


def wrong_header(draft: Draft) -> None:
    """A member of the header is another, or gone."""
    wrong: dict[str, list[object]] = {
        "alg": ["none", "HS256", "ES384", "RS256", "es256", "", None, 1, ["ES256"]],
        "typ": ["JWT", "AT+JWT", "application/at+jwt", "", None, 1],
        "kid": [OTHER_JWK.kid, "k1", "", None, 1, JWK.kid + "=", JWK.kid.swapcase()],
    }
    wrong_member(draft.head, draft.rng, wrong)


def one_more_header(draft: Draft) -> None:
    """A member of the header is one too many, or stands twice."""
    extra: list[Members] = [{"crit": ["exp"]}, {"jwk": OTHER_JWK.to_dict()}, {"b64": True}, {"zip": "DEF"}, {"x": 1}]
    extra += [{name: value} for name, value in draft.head.items()]
    more = draft.rng.choice(extra)
    draft.rewrite_head = lambda raw: with_more(raw, more)


def wrong_claim(draft: Draft) -> None:
    """A claim is gone, or says something else: nearly the right thing most of all."""
    exp, iat, nbf = (draft.body[name] for name in ("exp", "iat", "nbf"))
    wrong: dict[str, list[object]] = {
        "iss": [ISSUER + "/", ISSUER.upper(), ISSUER[:-1], [ISSUER], "", None, 1],
        "sub": ["", "orders", "spiffe://prod.example", "spiffe://prod.example/a/../b", None, 1, ["spiffe://a/b"]],
        "aud": ["bank", AUDIENCE.upper(), AUDIENCE + " ", [AUDIENCE], [AUDIENCE, "bank"], "", None, 1],
        "client_id": ["", "spiffe://Prod.example/a", "spiffe://prod.example/%61", None],
        "exp": [iat, exp - 10**6, str(exp), exp + 0.5, float(exp), None, True, 2**63, 10**30, exp + 10**5, -exp],
        "iat": [exp, exp + 1, iat + 10**6, str(iat), iat + 0.5, float(iat), None, True, 0, iat - 10**5],
        "nbf": [exp + 1, nbf + 10**6, str(nbf), float(nbf), None, True, -1],
        "jti": ["", "short", "a" * 65, None, 1, "a" * 15 + "."],
        "scope": ["", " ", "a  b", "a b a", "a ", None, 1, ["a"]],
        "rv": [-1, 2**53, "0", None, 0.0, True],
        "cnf": [{"x5t#S256": OTHER_PEER}, {"jkt": PEER}, {"x5t#S256": PEER, "jkt": PEER}, {}, None, PEER, [PEER]],
    }
    wrong_member(draft.body, draft.rng, wrong)


def one_more_claim(draft: Draft) -> None:
    """A claim is outside the profile, or stands twice."""
    extra: list[Members] = [{"act": {"sub": "a"}}, {"anc": []}, {"x": 1}, {"": 0}]
    extra += [{name: value} for name, value in draft.body.items()]
    more = draft.rng.choice(extra)
    draft.rewrite_body = lambda raw: with_more(raw, more)


def other_json(draft: Draft) -> None:
    """The payload is no plain JSON object."""
    draft.rewrite_body = draft.rng.choice(
        [
            lambda raw: b"\xef\xbb\xbf" + raw,
            lambda raw: raw + b" ",
            lambda raw: b"[" + raw + b"]",
            lambda raw: raw.decode().encode("utf-16"),
            lambda raw: raw.replace(b"tokens", rb"t\u006fkens"),
            lambda raw: raw.replace(b"://", rb":\/\/", 1),
            lambda raw: raw[:-1],
        ]
    )


def other_key(draft: Draft) -> None:
    """The signature is somebody else's."""
    draft.key = OTHER_KEY


def other_spelling(draft: Draft) -> None:
    """The text was changed after it was signed."""
    place, sign, kind = draft.rng.random(), draft.rng.choice(ALPHABET), draft.rng.choice("sidpwt")

    def respell(text: str) -> str:
        n = int(place * len(text))
        other = sign if sign != text[n] else ALPHABET[ALPHABET.index(sign) - 1]
        return {
            "s": text[:n] + other + text[n + 1 :],
            "i": text[:n] + sign + text[n:],
            "d": text[:n] + text[n + 1 :],
            "p": text + "=" * (1 + n % 3),
            "w": text[:n] + " " + text[n:],
            "t": text[:n],
        }[kind]

    draft.respell = respell


FAULTS: Final = [wrong_header, one_more_header, wrong_claim, one_more_claim, other_json, other_key, other_spelling]


def make(number: int, now: int) -> tuple[str, str, int]:
    """Return token `number`, the name of its fault (none: empty), and the leeway that it needs."""
    rng = random.Random(number)  # noqa: S311 - no secret
    draft, leeway = right_draft(rng, now)
    fault = rng.choice(FAULTS) if rng.random() < 0.5 else None
    if fault:
        fault(draft)
    return draft.text(), fault.__name__ if fault else "", leeway


def passes(text: str, now: datetime) -> bool:
    """Say whether our verifier accepts `text`. It raises nothing but its own error."""
    try:
        accept(text, keys=KEYS, now=now)
    except InvalidTokenError:
        return False
    return True


def test_j30_what_passes_here_passes_pyjwt_and_joserfc_and_nothing_faulty_passes_here() -> None:
    """Our accept set is inside both of theirs, holds every right token, and holds no other."""
    wrong: list[tuple[int, str, str]] = []
    seen: Counter[str] = Counter()
    for number in range(count("differential")):
        now = datetime.now(UTC)
        text, fault, leeway = make(number, int(now.timestamp()))
        passed = passes(text, now)
        seen[fault] += 1
        if passed != (not fault):
            wrong.append((number, fault, "ours"))
        if passed and not OTHERS.pyjwt_accepts(text, leeway=leeway):
            wrong.append((number, fault, "PyJWT"))
        if passed and not OTHERS.joserfc_accepts(text, leeway=leeway, now=now):
            wrong.append((number, fault, "joserfc"))
    kinds = {kind or "right": number for kind, number in sorted(seen.items())}
    record("differential", {"tokens": seen.total(), "kinds": kinds, "counterexamples": len(wrong)})
    assert [] == wrong
    assert {"", *(fault.__name__ for fault in FAULTS)} == set(seen)


def test_j30_what_pyjwt_and_joserfc_sign_passes_here() -> None:
    """The form is strict and not our own: other writers meet it too."""
    now = datetime.now(UTC)
    draft, _ = right_draft(random.Random(0), int(now.timestamp()))  # noqa: S311 - no secret
    jose_key = ECKey.import_key(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert passes(jwt.encode(draft.body, KEY, "ES256", {"typ": "at+jwt", "kid": JWK.kid}), now)
    assert passes(jose.encode(draft.head, draft.body, jose_key), now)


def test_j30_the_second_opinions_refuse_what_they_should() -> None:
    """They are no rubber stamps: wrong keys, issuers, audiences and times do not pass them either."""
    now = datetime.now(UTC)
    rng = random.Random(0)  # noqa: S311 - no secret

    def opinions(change: Callable[[Draft], object]) -> set[bool]:
        draft, _ = right_draft(rng, int(now.timestamp()))
        change(draft)
        text = draft.text()
        return {OTHERS.pyjwt_accepts(text, leeway=30), OTHERS.joserfc_accepts(text, leeway=30, now=now)}

    assert {True} == opinions(lambda _: None)
    assert {False} == opinions(lambda draft: draft.body.update(iss="https://evil.example"))
    assert {False} == opinions(lambda draft: draft.body.update(aud="bank"))
    assert {False} == opinions(lambda draft: draft.body.update(exp=int(now.timestamp()) - 60))
    assert {False} == opinions(lambda draft: draft.body.pop("sub"))
    assert {False} == opinions(other_key)


def test_j30_the_second_opinions_alone_would_let_faulty_tokens_pass() -> None:
    """Why the form is read strictly first: of these each library accepts some (RFC 8725 sections 2.4 and 3.11)."""
    now = datetime.now(UTC)
    let_through = {"faulty": 0, "PyJWT": 0, "joserfc": 0}
    for number in range(count("let_through")):
        text, fault, leeway = make(number, int(now.timestamp()))
        if fault:
            assert not passes(text, now)
            let_through["faulty"] += 1
            let_through["PyJWT"] += OTHERS.pyjwt_accepts(text, leeway=leeway)
            let_through["joserfc"] += OTHERS.joserfc_accepts(text, leeway=leeway, now=now)
    record("let_through", let_through)
    assert min(let_through.values()) > 0
