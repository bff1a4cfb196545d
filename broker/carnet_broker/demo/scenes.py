"""The scenes of the demo: what must work, and what must be refused. Each checks itself."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count
from typing import Any, Final, cast

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from carnet.claims import claims_of_payload
from carnet.encoding import decode_base64url
from carnet.errors import RequestDeniedError
from carnet.grpc import secure_channel
from carnet.tls import secure_channel as tls_channel
from carnet.verify import assemble, encode_unsigned, parse_unverified, raw_signature
from carnet_broker.demo.scene import Scene, SceneFailedError, Tell, client_of, require
from carnet_broker.demo.shop import AUDIENCE, CHARGE, SERVER_NAME, charge, decode, encode
from carnet_broker.demo.stage import ISSUER, Stage
from carnet_broker.demo.trust_scenes import TRUST_SCENES

__all__ = ["SCENES"]

_STAGING: Final = "https://tokens.staging.example"


def _call_with(stage: Stage, workload: str, token: str) -> dict[str, Any] | grpc.RpcError:
    """Call payments over a connection of `workload` with any token; return the answer or the error."""
    channel = tls_channel(
        stage.payments, identity=stage.identity(workload), ca_pem=stage.ca_file.read_bytes(), server_name=SERVER_NAME
    )
    with channel:
        call = channel.unary_unary(CHARGE, request_serializer=encode, response_deserializer=decode)
        try:
            answer: dict[str, Any] = call({"amount": 1}, timeout=5, metadata=(("authorization", f"Bearer {token}"),))
        except grpc.RpcError as error:
            return error
        return answer


def _must_refuse(answer: dict[str, Any] | grpc.RpcError, tell: Tell) -> None:
    if not isinstance(answer, grpc.RpcError):
        msg = f"payments accepted it: {answer}"
        raise SceneFailedError(msg)
    require(answer.code() is grpc.StatusCode.UNAUTHENTICATED, f"refused with {answer.code()}, not UNAUTHENTICATED")
    tell(f"payments: {answer.code().name}: {answer.details()}")


def _allowed(stage: Stage, tell: Tell) -> None:
    with (
        client_of(stage, "orders") as client,
        secure_channel(stage.payments, client=client, audience=AUDIENCE, server_name=SERVER_NAME) as channel,
    ):
        answer = charge(channel, 100)
        token = client.get_token(AUDIENCE)
    tell(f"payments: {json.dumps(answer)}")
    tell(f"the token: audience {token.audience}, scopes {', '.join(token.scopes)}, bound to orders' certificate")
    require(answer["for"] == "spiffe://prod.example/ns/shop/sa/orders", "payments saw another caller")


def _refused_scope(stage: Stage, tell: Tell) -> None:
    _must_deny(stage, tell, AUDIENCE, ["refund"], "SCOPE_NOT_GRANTED")
    explained = stage.run(
        [
            "carnet_broker",
            "policy",
            "explain",
            "--policy",
            str(stage.policy_file),
            "--audience",
            AUDIENCE,
            "--workload",
            "spiffe://prod.example/ns/shop/sa/orders",
            "--scope",
            "refund",
        ],
        {},
    )
    require(explained.returncode == 1, f"policy explain ended with {explained.returncode}, not 1 (denied)")
    for line in explained.stdout.strip().splitlines():
        tell(f"policy explain: {line.replace(str(stage.directory) + '/', '')}")


def _refused_audience(stage: Stage, tell: Tell) -> None:
    _must_deny(stage, tell, "bank", [], "NOT_GRANTED")


def _must_deny(stage: Stage, tell: Tell, audience: str, scopes: list[str], reason: str) -> None:
    with client_of(stage, "orders") as client:
        try:
            client.get_token(audience, scopes=scopes)
        except RequestDeniedError as error:
            require(error.reason == reason, f"the reason is {error.reason}, not {reason}")
            tell(f"broker: {error}")  # Its reason is at the end.
            return
    msg = "the broker issued a token"
    raise SceneFailedError(msg)


def _stolen(stage: Stage, tell: Tell) -> None:
    with client_of(stage, "orders") as client:
        token = client.get_token(AUDIENCE).value
    require(isinstance(_call_with(stage, "orders", token), dict), "the token is not good where it belongs")
    tell("on orders' own connection the token is good; now outsider shows it on a connection of its own")
    _must_refuse(_call_with(stage, "outsider", token), tell)


def _staging(stage: Stage, tell: Tell) -> None:
    with client_of(stage, "orders") as client:
        unverified = parse_unverified(client.get_token(AUDIENCE).value)
    claims = claims_of_payload(unverified.unverified_payload)
    signed = {}
    for issuer in (ISSUER, _STAGING):
        unsigned = encode_unsigned(replace(claims, issuer=issuer), unverified.kid)
        signed[issuer] = assemble(unsigned, _sign_as_root(stage, unverified.kid, unsigned))
    require(isinstance(_call_with(stage, "orders", signed[ISSUER]), dict), "the same key does not verify")
    tell(f"with the very key of production two tokens are signed, alike but for the issuer; {ISSUER} is accepted")
    tell(f"the other says {_STAGING}")
    _must_refuse(_call_with(stage, "orders", signed[_STAGING]), tell)


def _sign_as_root(stage: Stage, kid: str, signing_input: bytes) -> bytes:
    """Sign with the signing key, which only the root of this throw-away Vault can do by hand."""
    root = stage.vault.client()
    if stage.key_store == "transit":
        status = stage.run(["carnet_broker", "keys", "status", "--json"], stage.vault_environment("ci"))
        version = next(key["version"] for key in json.loads(status.stdout)["keys"] if key["jwk"]["kid"] == kid)
        wanted = {
            "input": base64.b64encode(signing_input).decode(),
            "key_version": version,
            "marshaling_algorithm": "jws",
        }
        answer: Any = root.write_data("transit/sign/carnet-prod/sha2-256", data=wanted)
        return decode_base64url(answer["data"]["signature"].rpartition(":")[2].encode())
    entry: Any = root.read(f"carnet/data/prod/keys/{kid}")
    key = serialization.load_pem_private_key(entry["data"]["data"]["private_key"].encode(), None)
    require(isinstance(key, ec.EllipticCurvePrivateKey), "the entry holds no P-256 key")
    return raw_signature(cast("ec.EllipticCurvePrivateKey", key).sign(signing_input, ec.ECDSA(SHA256())))


def _cron(stage: Stage, tell: Tell) -> None:
    done = stage.run(["carnet_broker.demo.cron"], stage.environment("cron"))
    require(done.returncode == 0, f"the job ended with {done.returncode}: {done.stderr.strip()}")
    tell(f"cron: {done.stdout.strip()} (exit code 0)")


@dataclass
class _Load:
    """Calls to payments without a pause, each with a token of its own."""

    calls: int = 0
    failures: int = 0
    last_failure: str = ""
    by_key: dict[str, int] | None = None


def _calls_with_fresh_tokens(stage: Stage, load: _Load, stop: threading.Event) -> None:
    """Call until told to stop. A life that was not asked for before is a token that is not in the cache."""
    load.by_key = {}
    channel = tls_channel(
        stage.payments, identity=stage.identity("orders"), ca_pem=stage.ca_file.read_bytes(), server_name=SERVER_NAME
    )
    with client_of(stage, "orders") as client, channel:
        call = channel.unary_unary(CHARGE, request_serializer=encode, response_deserializer=decode)
        for number in count():
            if stop.wait(0.02):
                return
            load.calls += 1
            try:
                token = client.get_token(AUDIENCE, ttl=timedelta(milliseconds=60_000 + number)).value
                call({"amount": 1}, timeout=5, metadata=(("authorization", f"Bearer {token}"),))
            except Exception as error:  # noqa: BLE001 - whatever it is, it counts
                load.failures += 1
                load.last_failure = str(error)
            else:
                kid = parse_unverified(token).kid
                load.by_key[kid] = load.by_key.get(kid, 0) + 1


def _rotation(stage: Stage, tell: Tell) -> None:
    load, stop = _Load(), threading.Event()
    worker = threading.Thread(target=_calls_with_fresh_tokens, args=(stage, load, stop))
    worker.start()
    orders = stage.start("orders", ["carnet_broker.demo.orders"], stage.environment("orders"))
    try:
        stop.wait(1.5)
        tell("orders calls payments 20 times a second, and another caller with a fresh token for each call")
        done = stage.run(["carnet_broker", "keys", "rotate", "--wait", "--json"], stage.vault_environment("ci"))
        require(done.returncode == 0, f"keys rotate ended with {done.returncode}: {done.stderr.strip()}")
        tell(f"CI: carnet-broker keys rotate --wait: {json.loads(done.stdout)['message']}")
        stop.wait(1.5)
    finally:
        stop.set()
        worker.join()
        orders.terminate()
        orders.wait(15)
    lines = (stage.directory / "orders.out").read_text().splitlines()
    told: dict[str, Any] = (
        json.loads(lines[-1]) if lines else {"calls": 0, "failures": 0, "last_failure": "it printed nothing"}
    )
    by_key = load.by_key or {}
    tell(f"orders: {told['calls']} calls, {told['failures']} failures")
    signed = f"signed by {len(by_key)} keys: {list(by_key.values())}"
    tell(f"fresh tokens: {load.calls} calls, {load.failures} failures, {signed}")
    require(told["calls"] > 0 and told["failures"] == 0, f"orders failed: {told['last_failure']}")
    require(load.failures == 0, f"a call with a fresh token failed: {load.last_failure}")
    require(len(by_key) > 1, "the calls saw one key only, so this shows no rotation")


def _ci_cannot_read(stage: Stage, tell: Tell) -> None:
    forced = stage.run(["carnet_broker", "keys", "rotate", "--now"], stage.vault_environment("ci"))
    require(forced.returncode == 2, f"keys rotate --now ended with {forced.returncode}, not 2")  # noqa: PLR2004
    tell(f"CI: carnet-broker keys rotate --now: {forced.stderr.strip()}")


SCENES: Final = (
    Scene("orders charges at payments: allowed", _allowed),
    Scene("orders asks for the scope refund: refused, and the operator sees why", _refused_scope),
    Scene("orders asks for the audience bank: refused", _refused_audience),
    Scene("a token of orders is stolen and used from another workload's connection: refused", _stolen),
    Scene("a token of staging is shown to production, signed by the very same key: refused", _staging),
    Scene("a cron worker charges once, and ends", _cron),
    Scene("CI rotates the signing key through Vault while calls are running: none fails", _rotation),
    Scene("CI wants to skip the wait for verifiers: refused, that takes breakglass", _ci_cannot_read),
    *TRUST_SCENES,
)
