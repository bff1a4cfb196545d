"""A live token before verifiers that are not ours: PyJWT, joserfc, and OpenBao's own `jwt` auth method."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime

import hvac
import jwt
import pytest
from joserfc import jwk as joserfc_jwk
from joserfc import jwt as joserfc_jwt

from carnet.encoding import base64url, decode_base64url
from carnet.errors import InvalidTokenError
from carnet.jwk import KeySet
from carnet.verify import Expectations, verify_token
from support.running_broker import ISSUER, ORDERS, RunningBroker, start_broker
from support.vault import fresh_name, prepare

CLAIMS = ["iss", "sub", "aud", "client_id", "exp", "iat", "nbf", "jti", "scope", "rv", "cnf"]


@pytest.fixture(scope="module", params=["kv", "transit"])
def broker(request, openbao, tmp_path_factory) -> Iterator[RunningBroker]:
    """One broker for each key store: the signatures are made by different hands."""
    directory = tmp_path_factory.mktemp("broker")
    place = prepare(openbao, directory / "login")
    with start_broker(place, directory / "broker", settings={"keys": {"store": request.param}}) as running:
        yield running
    place.close()


def jwks_url(broker: RunningBroker) -> str:
    """Return what is ``CARNET_JWKS_URL`` in a service's environment."""
    return f"http://{broker.addresses['plain']}/oauth2/jwks"


def fetched_keys(broker: RunningBroker) -> dict:
    """Fetch the key set as anybody would."""
    with urllib.request.urlopen(jwks_url(broker), timeout=5) as answer:  # noqa: S310 - a URL of our own
        keys: dict = json.load(answer)
        return keys


def test_pyjwt_accepts_the_token_with_full_claim_checks(broker):
    """Signature, issuer, audience and every claim required; and refuses it for another audience."""
    token = broker.issue("payments").token
    kid = jwt.get_unverified_header(token)["kid"]
    key = next(jwt.PyJWK(entry) for entry in fetched_keys(broker)["keys"] if entry["kid"] == kid)
    options = {"require": CLAIMS, "strict_aud": True}
    claims = jwt.decode(token, key, algorithms=["ES256"], audience="payments", issuer=ISSUER, options=options)
    assert ORDERS == claims["sub"]
    with pytest.raises(jwt.InvalidAudienceError):
        jwt.decode(token, key, algorithms=["ES256"], audience="bank", issuer=ISSUER, options=options)
    with pytest.raises(jwt.InvalidIssuerError):
        jwt.decode(
            token, key, algorithms=["ES256"], audience="payments", issuer="https://other.example", options=options
        )


def test_joserfc_accepts_the_token_with_full_claim_checks(broker):
    """The same with another library, which finds the key by its kid itself."""
    token = broker.issue("payments").token
    keys = joserfc_jwk.KeySet.import_key_set(fetched_keys(broker))
    decoded = joserfc_jwt.decode(token, keys, algorithms=["ES256"])
    registry = joserfc_jwt.JWTClaimsRegistry(
        now=int(datetime.now(UTC).timestamp()),
        iss={"essential": True, "value": ISSUER},
        aud={"essential": True, "value": "payments"},
        sub={"essential": True, "value": ORDERS},
        **{name: {"essential": True} for name in ("exp", "iat", "nbf", "jti", "scope", "client_id", "cnf")},
    )
    registry.validate(decoded.claims)
    assert {"alg": "ES256", "typ": "at+jwt", "kid": decoded.header["kid"]} == decoded.header


def test_openbao_logs_a_workload_in_with_its_token(broker, openbao):
    """`jwt` auth, pointed at the JWKS URL, with issuer, audience and subject bound; another audience is refused."""
    root = openbao.client()
    mount = fresh_name("jwt")
    root.sys.enable_auth_method("jwt", path=mount)
    root.write_data(f"auth/{mount}/config", data={"jwks_url": jwks_url(broker), "bound_issuer": ISSUER})
    for role, audience in (("payments", "payments"), ("bank", "bank")):
        root.write_data(
            f"auth/{mount}/role/{role}",
            data={
                "role_type": "jwt",
                "user_claim": "sub",
                "bound_audiences": [audience],
                "bound_subject": ORDERS,
                "token_ttl": "60s",
            },
        )
    token = broker.issue("payments").token
    anybody = openbao.client(token="")
    login = anybody.auth.jwt.jwt_login(role="payments", jwt=token, path=mount)
    known_as = openbao.client(token=login["auth"]["client_token"]).lookup_token()["data"]["display_name"]
    assert f"{mount}-{ORDERS}" == known_as
    with pytest.raises(hvac.exceptions.InvalidRequest):
        anybody.auth.jwt.jwt_login(role="bank", jwt=token, path=mount)
    head, body, signature = token.split(".")
    forged = json.loads(decode_base64url(body.encode())) | {"sub": ORDERS + "x"}
    with pytest.raises(hvac.exceptions.InvalidRequest):
        anybody.auth.jwt.jwt_login(
            role="payments",
            jwt=".".join([head, base64url(json.dumps(forged).encode()).decode(), signature]),
            path=mount,
        )


def test_j29_every_single_bit_flip_in_a_live_token_is_refused(broker):
    """Each of the eight bits of each byte, one at a time; the untouched token is accepted before and after."""
    identity = broker.identity()
    token = broker.issue("payments", identity=identity).token.encode()
    keys = KeySet.parse(broker.key_set().jwks)
    now = datetime.now(UTC)

    def accepted(candidate: bytes) -> bool:
        try:
            verify_token(
                candidate,
                keys=keys,
                expectations=Expectations(issuer=ISSUER, audience="payments"),
                peer_thumbprint=identity.thumbprint,
                now=now,
            )
        except InvalidTokenError:
            return False
        return True

    assert accepted(token)
    flipped = [
        (position, bit)
        for position in range(len(token))
        for bit in range(8)
        if accepted(token[:position] + bytes([token[position] ^ 1 << bit]) + token[position + 1 :])
    ]
    assert [] == flipped
    assert accepted(token)
