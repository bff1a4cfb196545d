"""Bad days of Vault, and what a whole broker makes of them: real processes, a real OpenBao, nothing restarted.

Two brokers live through all of it, one for each key store. With KV the key is in the broker's memory, and it goes on
issuing. With Transit it cannot, and says so at once with the time to wait; its callers live on the tokens that they
have. Both say that they are degraded, and both recover by themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from carnet import Client
from carnet.errors import BrokerUnavailableError
from carnet.jwk import KeySet
from carnet.verify import Expectations, verify_token
from carnet_broker.demo.openbao import OpenBao
from support.lying_vault import Received, drip, once, reply
from support.running_broker import ISSUER, RunningBroker, reason_of, start_broker
from support.vault import VaultPlace, prepare
from support.vault_proxy import VaultProxy, proxy_before

SIGN_WITHIN = 1.5
SETTINGS: dict[str, dict[str, Any]] = {
    "vault": {"timeout": "2s", "sign_within": "1500ms", "poll_interval": "200ms"},
    "limits": {"tokens_per_second": 1000, "token_burst": 1000},
}
STORES = ("kv", "transit")


@dataclass
class Pair:
    """A broker of each key store, and a caller of each that has a token already."""

    brokers: dict[str, RunningBroker]
    places: dict[str, VaultPlace]
    callers: dict[str, Client] = field(default_factory=dict)

    @property
    def kv(self) -> RunningBroker:
        """The one with the key in its memory."""
        return self.brokers["kv"]

    @property
    def transit(self) -> RunningBroker:
        """The one whose key is in Vault."""
        return self.brokers["transit"]

    def live_through(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        """Show what must hold while an outage goes on, and after it."""
        seen = {store: len(broker.log()) for store, broker in self.brokers.items()}
        held = {store: caller.get_token("payments") for store, caller in self.callers.items()}
        begin()
        try:
            for store, broker in self.brokers.items():
                broker.wait_for(lambda broker=broker: broker.readiness()["degraded"], f"{store} says degraded")
                status, body = broker.get("/readyz")
                assert (200, True, []) == (status, json.loads(body)["ready"], json.loads(body)["problems"])
                assert json.loads(broker.key_set().jwks) == json.loads(broker.get("/oauth2/jwks")[1])
                assert held[store] is cached(self.callers[store])
            issues(self.kv)
            cannot_sign(self.transit)
        finally:
            end()
        for store, broker in self.brokers.items():
            broker.wait_for(lambda broker=broker: not broker.readiness()["degraded"], f"{store} recovers", within=20)
            issues(broker)
            events = [entry["event"] for entry in broker.log()[seen[store] :] if entry["event"].startswith("vault_")]
            assert ["vault_failed", "vault_recovered"] == [e for e in events if e != "vault_failing_otherwise"]
            assert "Traceback" not in (broker.directory / "log").read_text()


def issues(broker: RunningBroker) -> None:
    """Show that a token is issued, and that it is good by the keys that are served."""
    identity = broker.identity()
    token = broker.issue("payments", identity=identity).token
    verify_token(
        token,
        keys=KeySet.parse(broker.key_set().jwks),
        expectations=Expectations(issuer=ISSUER, audience="payments"),
        peer_thumbprint=identity.thumbprint,
        now=datetime.now(UTC),
    )


def cannot_sign(broker: RunningBroker) -> None:
    """Show that the answer is UNAVAILABLE, why, and when to ask again; in time, also for many callers at once."""
    started = time.monotonic()
    error = refused(broker)
    assert time.monotonic() - started < SIGN_WITHIN + 1
    assert (grpc.StatusCode.UNAVAILABLE, "KEY_STORE_UNAVAILABLE") == (error.code(), reason_of(error))
    assert retry_after(error) > timedelta(0)


def refused(broker: RunningBroker) -> grpc.RpcError:
    """Ask for a token that cannot be had now."""
    with pytest.raises(grpc.RpcError) as caught:
        broker.issue("payments")
    return caught.value


def retry_after(error: grpc.RpcError) -> timedelta:
    """Return what the answer says about when to ask again."""
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(error).details)
    return retry.retry_delay.ToTimedelta()


def cached(caller: Client) -> object:
    """Return a caller's token, which has to come at once: the best of three, for the machine is shared."""
    best = 10.0
    for _ in range(3):
        started = time.perf_counter()
        token = caller.get_token("payments")
        best = min(best, time.perf_counter() - started)
    assert best < 0.05
    return token


@pytest.fixture(scope="module", name="server")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBao]:
    """A server for this module, over HTTPS, with its data on disk; its tests treat it badly and put it right."""
    with OpenBao.start(tmp_path_factory.mktemp("openbao"), dev=False, tls=True) as server:
        yield server


def start_pair(stack: ExitStack, server: OpenBao, directory: Path, address: str | None = None) -> Pair:
    """Start the two brokers, each with its own environment in `server`, and their callers."""
    pair = Pair({}, {})
    for store in STORES:
        place = pair.places[store] = prepare(server, directory / store / "login")
        settings = SETTINGS | {"keys": {"store": store}}
        if address is not None:
            settings |= {"vault": SETTINGS["vault"] | {"address": address}}
        pair.brokers[store] = stack.enter_context(start_broker(place, directory / store / "broker", settings=settings))
        pair.callers[store] = stack.enter_context(sdk(pair.brokers[store]))
    return pair


def sdk(broker: RunningBroker) -> Client:
    """Return a workload's client of `broker`."""
    return Client(brokers=broker.addresses["tokens"], identity=broker.identity(), ca_file=broker.ca_file)


@pytest.fixture(scope="module", name="direct")
def _direct(server: OpenBao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Brokers that speak to OpenBao itself."""
    with ExitStack() as stack:
        yield start_pair(stack, server, tmp_path_factory.mktemp("direct"))


@pytest.fixture(scope="module", name="proxy")
def _proxy(server: OpenBao) -> Iterator[VaultProxy]:
    """A way to OpenBao that can be told to lie."""
    with proxy_before(server) as proxy:
        yield proxy


@pytest.fixture(scope="module", name="behind")
def _behind(server: OpenBao, proxy: VaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Brokers that speak to the proxy."""
    with ExitStack() as stack:
        yield start_pair(stack, server, tmp_path_factory.mktemp("behind"), proxy.address)


def test_k06_a_revoked_login_of_vault_is_replaced_unseen(server, direct):
    """All logins of all brokers are revoked at once: they log in again, and no caller notices.

    It comes before the test that withdraws permissions: after that a session tries no new login for ten seconds.
    """
    seen = {store: len(broker.log()) for store, broker in direct.brokers.items()}
    server.client().sys.revoke_prefix("auth/approle/login")
    for _ in range(5):
        for store, broker in direct.brokers.items():
            issues(broker)
            assert [] == broker.readiness()["degraded"]
            assert [] == [e for e in broker.log()[seen[store] :] if e["event"].startswith("vault_")]
        time.sleep(0.1)


def test_k05_sealed(server, direct):
    """Vault is sealed, and unsealed again."""
    direct.live_through(server.seal, server.unseal)


def test_k05_stopped(server, direct):
    """Vault ends, and is started again; what it knew is on its disk."""
    direct.live_through(server.stop, server.restart)


def test_k05_slow(server, direct):
    """Vault stops in the middle of everything: connections are accepted, and nothing is ever said."""
    direct.live_through(server.pause, server.resume)


def test_k06_permission_withdrawn(server, direct):
    """The policies of the brokers' roles are emptied while they run, and restored."""
    client = server.client()
    names = [f"carnet-broker-{place.environment}" for place in direct.places.values()]
    policies = {name: client.sys.read_policy(name)["data"]["rules"] for name in names}

    def withdraw() -> None:
        for name in policies:
            client.sys.create_or_update_policy(name, 'path "nothing/at/all" { capabilities = ["read"] }')

    def restore() -> None:
        for name, rules in policies.items():
            client.sys.create_or_update_policy(name, rules)

    direct.live_through(withdraw, restore)


ERRORS = {"errors": ["something is wrong: hvs.canary-token"]}
LIES: dict[str, Any] = {
    "no HTTP": once(b"\x00\xff\x16\x03 canary \r\n\r\n"),
    "a page": reply(200, b"<html>canary</html>"),
    "truncated JSON": reply(200, b'{"data": {"data": {"document": "{'),
    "an answer that breaks off": once(reply(200, b"{}", headers={"Content-Length": "4000"})),
    "another form": reply(200, {"data": {"keys": 7, "metadata": "canary"}}),
    "nothing": reply(200, {"data": None}),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "a list": reply(200, []),
    "no such thing": reply(404, {"errors": []}),
    "elsewhere": reply(307, b"", headers={"Location": "http://127.0.0.1:1/"}),
    "429": reply(429, ERRORS),
    "473": reply(473, ERRORS),
    "500": reply(500, ERRORS),
    "503": reply(503, ERRORS),
}


@pytest.mark.parametrize("lie", LIES)
def test_k05_lying(behind, proxy, lie):
    """Whatever Vault answers, to a login as well: no answer is believed that is not what was asked for."""
    behind.live_through(lambda: proxy.lie(LIES[lie]), proxy.be_honest)


@pytest.mark.parametrize("how", ["hang", "drip", "hang up"])
def test_k05_saying_nothing(behind, proxy, how):
    """Vault accepts the request and does not answer, or says a byte now and then, or hangs up."""
    lies = {"hang": proxy.hang, "drip": drip(reply(200, {"data": {}}), proxy, every=0.3), "hang up": proxy.hang_up}
    behind.live_through(lambda: proxy.lie(lies[how]), proxy.be_honest)


def test_k05_no_caller_waits_behind_the_others_while_vault_hangs(behind, proxy):
    """Thirty callers at once, more than there are threads for Vault: each is told in time, and so is the SDK's; and a
    verifier that misses a key.
    """
    issues(behind.transit)
    request = behind.transit.identity()
    proxy.lie(proxy.hang)
    try:
        started = time.monotonic()
        errors = issue_many(behind.transit, request, 30)
        assert time.monotonic() - started < SIGN_WITHIN + 2
        assert {(grpc.StatusCode.UNAVAILABLE, "KEY_STORE_UNAVAILABLE")} == {(e.code(), reason_of(e)) for e in errors}
        with sdk(behind.transit) as newcomer, pytest.raises(BrokerUnavailableError) as caught:
            newcomer.get_token("payments", timeout=timedelta(seconds=2))
        assert caught.value.retryable
        assert cached(behind.callers["transit"])
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as unknown:
            behind.transit.key_set(missing="A" * 43)
        assert time.monotonic() - started < 3
        assert (grpc.StatusCode.UNAVAILABLE, "KEY_SET_UNAVAILABLE") == (unknown.value.code(), reason_of(unknown.value))
    finally:
        proxy.be_honest()
    behind.transit.wait_for(lambda: not behind.transit.readiness()["degraded"], "the recovery", within=20)
    issues(behind.transit)


def issue_many(broker: RunningBroker, identity: Any, number: int) -> list[grpc.RpcError]:  # noqa: ANN401 - an Identity
    """Ask `number` times at once over one connection; return the errors that all of them get."""
    method = "/carnet.v1.TokenService/IssueToken"
    with broker.channel(identity) as channel:
        ask = channel.unary_unary(method, request_serializer=None, response_deserializer=None)
        calls = [ask.future(b"\x0a\x08payments", timeout=10) for _ in range(number)]
        errors = [call.exception(timeout=10) for call in calls]
    assert all(isinstance(error, grpc.RpcError) for error in errors)
    return errors


@pytest.mark.parametrize("how", ["another version", "another input", "no signature", "garbage"])
def test_a_signature_that_is_not_good_never_leaves(behind, proxy, how):
    """Vault answers all else well, so nothing else is wrong; the caller gets no token, and no INTERNAL."""
    environment = behind.places["transit"].environment

    def lie(received: Received, send: Callable[[bytes], None]) -> None:
        if how == "another input":
            send(proxy.ask(Received(received.method, received.path, received.headers, other_input(received.body))))
            return
        answer = proxy.ask(received)
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        signature = body["data"]["signature"]
        version, _, text = signature.removeprefix("vault:").partition(":")
        body["data"]["signature"] = {
            "another version": f"vault:v{int(version[1:]) + 1}:{text}",
            "no signature": "",
            "garbage": f"vault:{version}:{'A' * len(text)}",
        }[how]
        send(reply(200, body))

    proxy.lies = {f"transit/sign/carnet-{environment}/sha2-256": lie}
    try:
        cannot_sign(behind.transit)
        issues(behind.kv)
        assert [] == behind.transit.readiness()["degraded"]
    finally:
        proxy.be_honest()
    issues(behind.transit)


def other_input(body: bytes) -> bytes:
    """Return the request to sign something else."""
    return json.dumps(json.loads(body) | {"input": "b3RoZXI="}).encode()


def test_b11_no_log_holds_what_vault_said_or_what_we_said_to_it(behind, proxy):
    """After all these outages: no text of an answer, no login token, no secret id is in the log of a broker."""
    tokens = {received.headers.get("x-vault-token", "") for received in proxy.received} - {""}
    assert tokens
    for store, broker in behind.brokers.items():
        log = (broker.directory / "log").read_text()
        secret = behind.places[store].bootstrapped.credentials["broker"].secret_id_file.read_text().strip()
        assert [] == [text for text in {"canary", secret, *tokens} if text in log]
