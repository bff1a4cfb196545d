"""What PyJWT and joserfc say of a token, each with all the checks it has. They are lenient in form; see ADR 0002."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jwt
from joserfc import jwt as jose
from joserfc.errors import JoseError
from joserfc.jwk import KeySet as JoseKeySet

from carnet.jwk import KeySet
from support.tokens import AUDIENCE, ISSUER

_CLAIMS = ("iss", "sub", "aud", "client_id", "exp", "iat", "nbf", "jti", "scope", "rv")


class SecondOpinion:
    """Two other verifiers that trust the same keys, and want the same issuer and audience."""

    def __init__(self, keys: KeySet) -> None:
        self._keys = keys
        self._jose_keys = JoseKeySet.import_key_set({"keys": [{**key.to_dict()} for key in keys.keys.values()]})

    def pyjwt_accepts(self, text: str, *, leeway: int) -> bool:
        """Say whether PyJWT accepts `text`, now by the machine's clock: it has no other."""
        try:
            key = self._keys.get(jwt.get_unverified_header(text).get("kid", ""))
            if key is None:
                return False
            jwt.decode(
                text,
                key.public_key,
                algorithms=["ES256"],
                audience=AUDIENCE,
                issuer=ISSUER,
                leeway=leeway,
                options={"require": list(_CLAIMS), "strict_aud": True},
            )
        except jwt.InvalidTokenError:
            return False
        return True

    def joserfc_accepts(self, text: str, *, leeway: int, now: datetime) -> bool:
        """Say whether joserfc accepts `text` at `now`."""
        named: Mapping[str, Any] = {"iss": {"value": ISSUER}, "aud": {"value": AUDIENCE}}
        wanted: dict[str, Any] = {claim: {"essential": True, **named.get(claim, {})} for claim in _CLAIMS}
        try:
            decoded = jose.decode(text, self._jose_keys, algorithms=["ES256"])
            jose.JWTClaimsRegistry(now=int(now.timestamp()), leeway=leeway, **wanted).validate(decoded.claims)
        except (JoseError, ValueError):
            return False
        return True
