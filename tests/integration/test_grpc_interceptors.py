from __future__ import annotations

import asyncio
import contextvars
import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from carnet.caller import current
from carnet.certificate_names import certificate_names
from carnet.errors import BrokerUnavailableError, ConfigError, RequestDeniedError
from carnet.grpc import (
    NoTokenError,
    ServerInterceptor,
    allow_any_scope,
    allow_unauthenticated,
    require,
    secure_aio_channel,
    secure_channel,
)
from carnet.grpc.guard import Guard
from carnet.grpc.refusals import Refusal, RefusedError
from carnet.identity import Identity
from carnet.revocations import RevocationKind
from carnet.source import AsyncClient, Client
from carnet.testing.ca import CertificateAuthority
from carnet.tls import secure_channel as tls_channel
from carnet.trust import Verifier
from carnet.verify import parse_unverified
from support.broker_stub import ISSUER, BrokerStub
from support.grpc_services import KINDS, OWN, PAYMENTS_ID, SILENT, STACKS, TICKING, call, call_async, method, serve

ORDERS = "spiffe://prod.example/ns/shop/sa/orders"
CRON = "spiffe://prod.example/ns/shop/sa/cron"
NAME = "payments.shop.svc.prod.example"
CHARGE = {method(kind): require(scopes=["charge"]) for kind in KINDS}


@dataclass(frozen=True)
class Scene:
    """A CA, a broker, the identity of a caller, and what the service's verifier is made with."""

    ca: CertificateAuthority
    ca_file: Path
    broker: BrokerStub
    orders: Identity
    verifier: dict[str, Any]

    def identity(self, spiffe_id: str, **window: datetime) -> Identity:
        """Return a new identity."""
        issued = self.ca.issue(spiffe_id, **window)
        return Identity.parse(issued.certificate_pem, issued.private_key_pem)

    def token(self, **claims: Any) -> str:  # noqa: ANN401 - the arguments of mint
        """Return a token that is good for the caller, but for `claims`."""
        return self.broker.mint(**{"thumbprint": self.orders.thumbprint} | claims)

    def channel(self, target: str, identity: Identity | None = None) -> grpc.Channel:
        """Return a channel that attaches nothing."""
        return tls_channel(target, identity=identity or self.orders, ca_pem=self.ca.root_pem, server_name=NAME)

    def client(self, **more: Any) -> Client:  # noqa: ANN401 - those of Client
        """Return a source of tokens for the caller."""
        return Client(brokers=self.broker.target, identity=self.orders, ca_file=self.ca_file, **more)

    def async_client(self, **more: Any) -> AsyncClient:  # noqa: ANN401 - those of AsyncClient
        """Return what `client` returns, for asyncio."""
        return AsyncClient(brokers=self.broker.target, identity=self.orders, ca_file=self.ca_file, **more)


def _stage(directory: Path) -> Iterator[Scene]:
    ca = CertificateAuthority.create("prod.example")
    ca_file = directory / "ca.pem"
    ca_file.write_bytes(ca.root_pem)
    with BrokerStub.start(ca) as broker:
        scene = Scene(ca, ca_file, broker, _identity(ca, ORDERS), {})
        scene.verifier.update(
            audience="payments",
            issuer=ISSUER,
            trust=broker.target,
            identity=_identity(ca, PAYMENTS_ID),
            ca_file=ca_file,
        )
        yield scene


def _identity(ca: CertificateAuthority, spiffe_id: str) -> Identity:
    issued = ca.issue(spiffe_id)
    return Identity.parse(issued.certificate_pem, issued.private_key_pem)


@pytest.fixture(name="scene")
def _scene(tmp_path: Path) -> Iterator[Scene]:
    yield from _stage(tmp_path)


@pytest.fixture(name="shared", scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A scene for tests that change nothing in it."""
    yield from _stage(tmp_path_factory.mktemp("shared"))


@pytest.fixture(name="target", scope="module", params=STACKS)
def _target(request: pytest.FixtureRequest, shared: Scene) -> Iterator[str]:
    """The service in one stack after the other, with one rule for all of its methods."""
    with serve(request.param, shared.ca, CHARGE, shared.verifier) as target:
        yield target


def reason_of(error: grpc.RpcError) -> str:
    """Return ``google.rpc.ErrorInfo.reason`` of a call that failed, having checked that it is one of Carnet's."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert "carnet" == info.domain
    return info.reason


def refusal(channel: grpc.Channel, kind: str, *values: str) -> tuple[grpc.StatusCode, str, str]:
    """Make a call with these values of ``authorization``, which must be refused; return code, reason and text."""
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, kind, [b"x"], metadata=[("authorization", value) for value in values])
    return refused.value.code(), reason_of(refused.value), refused.value.details()


def unauthenticated(reason: Refusal) -> tuple[grpc.StatusCode, str, str]:
    """Return what every caller without a good token is told."""
    return grpc.StatusCode.UNAUTHENTICATED, reason.value, "a valid token is required"


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_token_on_its_own_connection_is_let_through(kind: str, target: str, shared: Scene):
    """The handler runs, and knows its caller in each step of the call."""
    with shared.channel(target) as channel:
        metadata = [("authorization", f"Bearer {shared.token()}")]
        answers = call(channel, kind, [b"x"], metadata=metadata)
    assert set(answers) == {f"x from {ORDERS}".encode()}


@pytest.mark.parametrize("scheme", ["bearer ", "BEARER ", "BeArEr    "])
def test_the_scheme_is_read_in_any_case_and_with_any_number_of_spaces(scheme: str, target: str, shared: Scene):
    """RFC 9110 section 11.1, RFC 6750 section 2.1."""
    with shared.channel(target) as channel:
        assert call(channel, "unary_unary", [b"x"], metadata=[("authorization", scheme + shared.token())])


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_without_exactly_one_bearer_token_is_refused(kind: str, target: str, shared: Scene):
    """G05: none, two (good ones at that), another scheme, no scheme, another header."""
    good = f"Bearer {shared.token()}"
    with shared.channel(target) as channel:
        for values in ([], [good, good], ["Basic b3JkZXJzOng="], [shared.token()], [f"DPoP {shared.token()}"], [""]):
            assert unauthenticated(Refusal.NO_TOKEN) == refusal(channel, kind, *values)
        with pytest.raises(grpc.RpcError) as refused:
            call(channel, kind, [b"x"], metadata=[("proxy-authorization", good)])
        assert Refusal.NO_TOKEN == reason_of(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_not_good_is_refused_and_the_caller_is_not_told_why(kind: str, target: str, shared: Scene):
    """Wrong audience, expired, unbound, altered, two in one value, garbage: one text, one reason."""
    past = datetime.now(UTC) - timedelta(minutes=10)
    token = shared.token()
    bad = [
        shared.token(audience="bank"),
        shared.token(now=past),
        shared.token(thumbprint=None),
        token[:-10] + ("A" if token[-10] != "A" else "B") + token[-9:],
        f"{token} {token}",
        "garbage",
    ]
    with shared.channel(target) as channel:
        for value in bad:
            assert unauthenticated(Refusal.INVALID_TOKEN) == refusal(channel, kind, f"Bearer {value}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stolen_token_is_refused_on_the_connection_of_another_workload(kind: str, target: str, shared: Scene):
    """T26: the token is good, and the certificate is good, but they do not belong together."""
    with shared.channel(target, shared.identity(CRON)) as thief:
        assert unauthenticated(Refusal.WRONG_CONFIRMATION) == refusal(thief, kind, f"Bearer {shared.token()}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_the_certificate_before_the_renewal_is_told_apart(kind: str, target: str, shared: Scene):
    """J26: same workload, new certificate: refused with the reason that a caller can cure."""
    with shared.channel(target, shared.identity(ORDERS)) as renewed:
        assert unauthenticated(Refusal.WRONG_CONFIRMATION) == refusal(renewed, kind, f"Bearer {shared.token()}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_without_the_scope_is_refused(kind: str, target: str, shared: Scene):
    """PERMISSION_DENIED: the caller is known, and may not."""
    expected = (grpc.StatusCode.PERMISSION_DENIED, "INSUFFICIENT_SCOPE", "the token does not allow this method")
    with shared.channel(target) as channel:
        assert expected == refusal(channel, kind, f"Bearer {shared.token(scopes=['refund'])}")
        metadata = [("authorization", f"Bearer {shared.token(scopes=['refund', 'charge'])}")]
        assert call(channel, kind, [b"x"], metadata=metadata)


@pytest.mark.parametrize(("length", "refused"), [(8192, False), (8192 + 40, True)])
def test_a_value_that_is_too_long_is_not_looked_at(length: int, refused: bool):
    """gRPC refuses many of them first, some that are over 8 KiB and all that are over 16 (tried): this is ours."""
    guard, metadata = Guard({}, stream="token"), [("authorization", "Bearer " + "x" * length)]
    if refused:
        with pytest.raises(RefusedError, match="too long"):
            guard.presented(metadata, {}, now=datetime.now(UTC))
    else:
        assert length == len(guard.presented(metadata, {}, now=datetime.now(UTC)).token)


@pytest.mark.parametrize("stack", STACKS)
def test_each_method_has_its_own_rule_and_one_without_a_rule_is_open_to_nobody(stack: str, shared: Scene):
    """Default refuse: a good token does not help, and without a token nobody learns that there is no rule."""
    rules = {
        method("unary_unary"): allow_any_scope(),
        method("unary_stream"): require(scopes=["refund", "charge"]),
        method("stream_unary"): allow_unauthenticated(),
    }
    with serve(stack, shared.ca, rules, shared.verifier) as target, shared.channel(target) as channel:
        good = f"Bearer {shared.token()}"
        assert call(channel, "unary_unary", [b"x"], metadata=[("authorization", good)])
        assert unauthenticated(Refusal.NO_TOKEN) == refusal(channel, "unary_unary")
        assert "INSUFFICIENT_SCOPE" == refusal(channel, "unary_stream", good)[1]
        expected = (grpc.StatusCode.PERMISSION_DENIED, "NO_RULE", "this method is open to nobody")
        assert expected == refusal(channel, "stream_stream", good)
        assert unauthenticated(Refusal.NO_TOKEN) == refusal(channel, "stream_stream")
        # Open by choice: the handler is reached, and has no caller to ask for, even where a token was sent.
        for values in ([], [("authorization", good)]):
            with pytest.raises(grpc.RpcError) as failed:
                call(channel, "stream_unary", [b"x"], metadata=values)
            assert grpc.StatusCode.UNKNOWN is failed.value.code()
            assert "there is no verified caller here" in failed.value.details()
        with pytest.raises(grpc.RpcError) as unknown:
            channel.unary_unary("/shop.Payments/Nothing")(b"x", metadata=[("authorization", good)])
        assert grpc.StatusCode.UNIMPLEMENTED is unknown.value.code()


@pytest.mark.parametrize("stack", STACKS)
def test_a_service_without_keys_cannot_tell_and_says_when_to_try_again(stack: str, scene: Scene):
    """UNAVAILABLE and not UNAUTHENTICATED: the caller's token may be good."""
    scene.broker.trust_faults.unavailable()
    scene.broker.watch_faults.unavailable()
    with serve(stack, scene.ca, CHARGE, scene.verifier) as target, scene.channel(target) as channel:
        for kind in KINDS:
            with pytest.raises(grpc.RpcError) as refused:
                call(channel, kind, [b"x"], metadata=[("authorization", f"Bearer {scene.token()}")])
            assert grpc.StatusCode.UNAVAILABLE is refused.value.code()
            assert Refusal.KEY_SET_UNAVAILABLE == reason_of(refused.value)
            retry = error_details_pb2.RetryInfo()
            assert rpc_status.from_call(refused.value).details[1].Unpack(retry)
            assert timedelta(seconds=1) == retry.retry_delay.ToTimedelta()


@pytest.mark.parametrize("stack", STACKS)
def test_an_open_connection_does_not_outlive_the_certificate_behind_it(stack: str, shared: Scene):
    """T17: the leaf is looked at on every call; a token that would still be good does not help."""
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=3)
    identity = shared.identity(ORDERS, not_after=ends)
    bearer = f"Bearer {shared.token(thumbprint=identity.thumbprint)}"
    with serve(stack, shared.ca, CHARGE, shared.verifier) as target, shared.channel(target, identity) as channel:
        assert call(channel, "unary_unary", [b"x"], metadata=[("authorization", bearer)])
        time.sleep(max((ends - datetime.now(UTC)).total_seconds() + 0.05, 0))
        for kind in KINDS:
            assert unauthenticated(Refusal.INVALID_TOKEN) == refusal(channel, kind, bearer)


@pytest.mark.parametrize("stack", STACKS)
def test_a_service_that_cannot_see_certificates_takes_unbound_tokens_by_choice(stack: str, shared: Scene):
    """`binding="none"` without TLS (it ends at a proxy): accepted; with the default every call is refused."""
    bearer = f"Bearer {shared.token(thumbprint=None)}"
    for binding, accepted in (("none", True), ("certificate", False)):
        verifier = shared.verifier | {"binding": binding}
        with (
            serve(stack, shared.ca, CHARGE, verifier, plain=True) as target,
            grpc.insecure_channel(target) as channel,
        ):
            if accepted:
                assert call(channel, "unary_unary", [b"x"], metadata=[("authorization", bearer)])
                assert unauthenticated(Refusal.NO_TOKEN) == refusal(channel, "unary_unary")
            else:
                assert unauthenticated(Refusal.INVALID_TOKEN) == refusal(channel, "unary_unary", bearer)


@pytest.mark.parametrize("stack", STACKS)
def test_the_log_has_the_reason_and_never_the_token(stack: str, shared: Scene, caplog: pytest.LogCaptureFixture):
    """B11: who was refused what, and why; of the token its name at most."""
    secret = shared.token(audience="bank")
    with (
        caplog.at_level(logging.DEBUG),
        serve(stack, shared.ca, CHARGE, shared.verifier) as target,
        shared.channel(target) as channel,
    ):
        refusal(channel, "unary_unary", f"Bearer {secret}")
        refusal(channel, "unary_unary", f"Bearer {shared.token(scopes=['refund'])}")
    assert f"refused '/shop.Payments/unary_unary' to {ORDERS}: WRONG_AUDIENCE: the token is for audience" in caplog.text
    assert "lacks scope charge" in caplog.text
    assert not any(part in caplog.text for part in secret.split("."))


@pytest.mark.parametrize("stack", STACKS)
def test_b10_a_caller_that_is_refused_without_end_fills_only_its_part_of_the_log(
    stack: str, shared: Scene, caplog: pytest.LogCaptureFixture
):
    """Two hundred refusals: forty lines at once, and ten a second."""
    with serve(stack, shared.ca, CHARGE, shared.verifier) as target, shared.channel(target) as channel:
        begin = time.monotonic()
        with caplog.at_level(logging.WARNING, "carnet.grpc"):
            for _ in range(200):
                refusal(channel, "unary_unary")
        allowed = 40 + 10 * (time.monotonic() - begin) + 1
        assert 40 <= sum(line.startswith("refused") for line in caplog.messages) <= allowed < 200


@pytest.mark.parametrize("stack", STACKS)
def test_a_busy_stream_ends_with_its_token(stack: str, scene: Scene):
    """Rule 11: messages pass until the token ends, and the caller is told why it was the last."""
    _check_busy_end(stack, scene, scene.token(life=timedelta(seconds=2)), scene.orders, seconds=2)


@pytest.mark.parametrize("stack", STACKS)
def test_a_busy_stream_ends_with_the_certificate_of_its_caller(stack: str, scene: Scene):
    """T17: the token would live for minutes, the certificate does not."""
    identity = scene.identity(ORDERS, not_after=datetime.now(UTC) + timedelta(seconds=3))
    _check_busy_end(stack, scene, scene.token(thumbprint=identity.thumbprint), identity, seconds=3)


def _check_busy_end(stack: str, scene: Scene, token: str, identity: Identity, *, seconds: float) -> None:
    metadata = [("authorization", f"Bearer {token}")]

    def messages() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x"
            time.sleep(0.05)

    with serve(stack, scene.ca, CHARGE, scene.verifier) as target, scene.channel(target, identity) as channel:
        call(channel, "unary_unary", [b"x"], metadata=metadata)  # Connected; what follows is not delayed by it.
        outcomes: queue.Queue[tuple[str, float, grpc.RpcError]] = queue.Queue()

        def run(kind: str) -> None:
            started = time.monotonic()
            try:
                call(channel, kind, [TICKING] if kind == "unary_stream" else messages(), metadata=metadata)
            except grpc.RpcError as error:
                outcomes.put((kind, time.monotonic() - started, error))

        threads = [threading.Thread(target=run, args=[kind]) for kind in KINDS if "stream" in kind]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 3 == outcomes.qsize()
    while not outcomes.empty():
        _, elapsed, error = outcomes.get()
        assert grpc.StatusCode.UNAUTHENTICATED is error.code()
        assert Refusal.TOKEN_ENDED == reason_of(error)
        assert seconds - 2 < elapsed < seconds + 1.5  # Times in tokens and certificates are whole seconds.


@pytest.mark.parametrize(
    ("stack", "code"),
    [("threads", grpc.StatusCode.CANCELLED), ("asyncio", grpc.StatusCode.UNAUTHENTICATED)],
)
def test_a_silent_stream_is_ended_too(stack: str, code: grpc.StatusCode, scene: Scene):
    """Nothing passes on it, and it does not stay open for that: two seconds of token, one of grace at most."""
    metadata = [("authorization", f"Bearer {scene.token(life=timedelta(seconds=2))}")]
    with serve(stack, scene.ca, CHARGE, scene.verifier) as target, scene.channel(target) as channel:
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as ended:
            call(channel, "unary_stream", [SILENT], metadata=metadata)
        assert code is ended.value.code()
        assert 1 < time.monotonic() - started < 6


@pytest.mark.parametrize("stack", STACKS)
def test_a_busy_stream_ends_when_its_token_is_revoked(stack: str, scene: Scene):
    """Rule 11: the right ends now, and not with the token; a stream of another token goes on."""
    token, other = scene.token(), scene.token()
    ended: queue.Queue[tuple[float, grpc.RpcError]] = queue.Queue()
    with serve(stack, scene.ca, CHARGE, scene.verifier) as target, scene.channel(target) as channel:
        started = threading.Event()

        def run(text: str, kind: str) -> None:
            argument = TICKING if kind == "unary_stream" else _ticking()
            metadata = [("authorization", f"Bearer {text}")]
            try:
                for _ in getattr(channel, kind)(method(kind))(argument, metadata=metadata, timeout=30):
                    started.set()
            except grpc.RpcError as error:
                ended.put((time.monotonic(), error))

        threads = [
            threading.Thread(target=run, args=arguments)
            for arguments in ((token, "unary_stream"), (token, "stream_stream"), (other, "stream_stream"))
        ]
        for thread in threads:
            thread.start()
        assert started.wait(10)
        time.sleep(0.5)
        assert ended.empty()
        revoked_at = time.monotonic()
        scene.broker.revoke(RevocationKind.TOKEN, _token_id(token))
        for _ in range(2):
            at, error = ended.get(timeout=5)
            assert (grpc.StatusCode.UNAUTHENTICATED, Refusal.TOKEN_ENDED) == (error.code(), reason_of(error))
            assert at - revoked_at < 1
        for thread in threads:
            thread.join(20)
        assert ended.empty()


def _ticking() -> Iterator[bytes]:
    for _ in range(60):
        yield b"x"
        time.sleep(0.05)


def _token_id(token: str) -> str:
    return str(parse_unverified(token).unverified_payload["jti"])


@pytest.mark.parametrize(
    ("stack", "code"),
    [("threads", grpc.StatusCode.CANCELLED), ("asyncio", grpc.StatusCode.UNAUTHENTICATED)],
)
def test_a_silent_stream_ends_when_the_certificate_of_its_caller_is_revoked(
    stack: str, code: grpc.StatusCode, scene: Scene
):
    """T16: nothing passes on it, and within two seconds it is over."""
    name = next(name for name in certificate_names(scene.orders.certificate) if name.startswith("serial:"))
    metadata = [("authorization", f"Bearer {scene.token()}")]
    with serve(stack, scene.ca, CHARGE, scene.verifier) as target, scene.channel(target) as channel:
        answers = channel.unary_stream(method("unary_stream"))(SILENT, metadata=metadata, timeout=30)
        assert [next(answers), next(answers)]  # It is silent from here on.
        revoked_at = time.monotonic()
        scene.broker.revoke(RevocationKind.CERTIFICATE, name)
        with pytest.raises(grpc.RpcError) as ended:
            list(answers)
        assert code is ended.value.code()
        assert time.monotonic() - revoked_at < 2.5
        assert unauthenticated(Refusal.INVALID_TOKEN) == refusal(channel, "unary_unary", metadata[0][1])


def test_a_stream_that_nobody_reads_ends_when_its_token_is_revoked(scene: Scene):
    """A writer that is held up by its reader hears of it a second later."""
    ended, begun = threading.Event(), threading.Event()

    async def flood(_: bytes, __: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: ANN401 - a generator
        try:
            while True:
                begun.set()
                yield b"x" * 100_000
        finally:
            ended.set()

    token = scene.token()
    with (
        serve("asyncio", scene.ca, CHARGE, scene.verifier, unary_stream=flood) as target,
        scene.channel(target) as channel,
    ):
        answers = channel.unary_stream(method("unary_stream"))(
            b"x", metadata=[("authorization", f"Bearer {token}")], timeout=30
        )
        assert begun.wait(10)
        time.sleep(0.5)
        scene.broker.revoke(RevocationKind.TOKEN, _token_id(token))
        assert ended.wait(5)
        with pytest.raises(grpc.RpcError) as refused:
            list(answers)
        assert Refusal.TOKEN_ENDED == reason_of(refused.value)


@pytest.mark.parametrize("stack", STACKS)
def test_a_method_may_go_on_with_what_is_too_old_by_its_rule(stack: str, scene: Scene):
    """`require(..., on_stale="accept")` for one method; the others cannot tell. The broker hears of it beforehand."""
    rules = CHARGE | {method("unary_unary"): require(scopes=["charge"], on_stale="accept")}
    bearer = f"Bearer {scene.token()}"
    settings = scene.verifier | {"max_staleness": timedelta(seconds=1)}
    scene.broker.heartbeat = timedelta(milliseconds=200)
    with serve(stack, scene.ca, rules, settings) as target, scene.channel(target) as channel:
        assert call(channel, "unary_unary", [b"x"], metadata=[("authorization", bearer)])
        assert call(channel, "unary_stream", [b"x"], metadata=[("authorization", bearer)])
        deadline = time.monotonic() + 5
        while not any(hello.accepts_stale for hello in scene.broker.hellos):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        scene.broker.down()
        time.sleep(1.5)
        assert call(channel, "unary_unary", [b"x"], metadata=[("authorization", bearer)])
        assert (grpc.StatusCode.UNAVAILABLE, "KEY_SET_UNAVAILABLE") == refusal(channel, "unary_stream", bearer)[:2]


def test_a_rule_with_another_choice_than_refuse_and_accept_is_refused():
    """When the rule is made."""
    for make in (lambda: require(scopes=["charge"], on_stale="shrug"), lambda: allow_any_scope(on_stale="shrug")):
        with pytest.raises(ConfigError, match="on_stale is 'shrug': give 'refuse' or 'accept'"):
            make()


@pytest.mark.parametrize("stack", STACKS)
def test_a_stream_stays_open_by_choice(stack: str, scene: Scene):
    """`stream="open"`: the right to call is looked at when the stream starts, and not again."""
    metadata = [("authorization", f"Bearer {scene.token(life=timedelta(seconds=1))}")]

    def messages() -> Iterator[bytes]:
        yield b"x"
        time.sleep(2.5)
        yield b"y"

    with (
        serve(stack, scene.ca, CHARGE, scene.verifier, stream="open") as target,
        scene.channel(target) as channel,
    ):
        assert 2 == len(call(channel, "stream_stream", messages(), metadata=metadata))
        assert "INVALID_TOKEN" == refusal(channel, "stream_stream", metadata[0][1])[1]


def test_a_stream_that_nobody_reads_is_ended_and_its_handler_with_it(scene: Scene):
    """A writer that is held up by its reader sits in no timer's way: the call ends a second after its right."""
    ended = threading.Event()

    async def flood(_: bytes, __: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: ANN401 - a generator
        try:
            while True:
                yield b"x" * 100_000
        finally:
            ended.set()

    with (
        serve("asyncio", scene.ca, CHARGE, scene.verifier, unary_stream=flood) as target,
        scene.channel(target) as channel,
    ):
        metadata = [("authorization", f"Bearer {scene.token(life=timedelta(seconds=1))}")]
        answers = channel.unary_stream(method("unary_stream"))(b"x", metadata=metadata, timeout=30)
        assert ended.wait(10)
        with pytest.raises(grpc.RpcError) as refused:
            list(answers)
        assert Refusal.TOKEN_ENDED == reason_of(refused.value)


def test_current_says_so_where_there_is_no_caller():
    """Outside of a handler there is nobody, and nobody is an error, not None."""
    with pytest.raises(ConfigError, match="no verified caller"):
        contextvars.Context().run(current)


@pytest.mark.parametrize("scopes", [[], (), "charge", [""], ["two words"]])
def test_a_rule_that_asks_for_nothing_cannot_be_made_by_accident(scopes: Any):  # noqa: ANN401 - wrong on purpose
    """Empty means refuse: an empty list of scopes is a mistake, and so is one text."""
    with pytest.raises(ConfigError):
        require(scopes=scopes)


@pytest.mark.parametrize("name", ["shop.Payments/Charge", "/Charge", "/shop.Payments/", "/shop.Payments/*/x", ""])
def test_a_rule_for_what_is_no_method_is_refused(name: str, shared: Scene):
    """It would never match, and its method would be refused for no reason that anybody sees."""
    with pytest.raises(ConfigError, match="is not a method"):
        ServerInterceptor(Verifier(**shared.verifier), {name: allow_any_scope()})


def test_an_unknown_end_of_streams_is_refused(shared: Scene):
    """A misspelt `stream` does not leave streams open."""
    with pytest.raises(ConfigError, match="give 'token' or 'open'"):
        ServerInterceptor(Verifier(**shared.verifier), CHARGE, stream="never")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_channel_attaches_the_token_of_its_identity(kind: str, target: str, shared: Scene):
    """Both stacks of the caller, all kinds: the calls go through, metadata of the caller's own is kept."""
    with (
        shared.client() as client,
        secure_channel(target, client=client, audience="payments", scopes=["charge"], server_name=NAME) as channel,
    ):
        answers = await asyncio.to_thread(call, channel, kind, [b"x", b"y"], metadata=[(OWN, " (own)")])
    async with (
        shared.async_client() as async_client,
        secure_aio_channel(
            target, client=async_client, audience="payments", scopes=["charge"], server_name=NAME
        ) as async_channel,
    ):
        own = grpc.aio.Metadata((OWN, " (own)"))
        assert answers == await call_async(async_channel, kind, [b"x", b"y"], metadata=own)
        assert [(OWN, " (own)")] == list(own)
    assert f"x from {ORDERS} (own)".encode() == answers[0].split(b"; ")[0]


async def test_a_thousand_calls_take_one_token(scene: Scene):
    """The token is asked for at the first call and attached to each."""
    with serve("threads", scene.ca, CHARGE, scene.verifier) as target:
        with (
            scene.client() as client,
            secure_channel(target, client=client, audience="payments", server_name=NAME) as channel,
        ):
            for _ in range(50):
                await asyncio.to_thread(call, channel, "unary_unary", [b"x"])
        async with (
            scene.async_client() as async_client,
            secure_aio_channel(target, client=async_client, audience="payments", server_name=NAME) as async_channel,
        ):
            await asyncio.gather(*(call_async(async_channel, "unary_unary", [b"x"]) for _ in range(50)))
    assert 2 == len(scene.broker.issue_calls)
    assert {"payments"} == {issued.audience for issued in scene.broker.issue_calls}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_that_brings_its_own_authorization_is_an_error(kind: str, target: str, shared: Scene):
    """Not silently doubled, not silently replaced."""
    metadata = [("authorization", "Bearer own")]
    with (
        shared.client() as client,
        secure_channel(target, client=client, audience="payments", server_name=NAME) as channel,
        pytest.raises(ConfigError, match="already"),
    ):
        call(channel, kind, [b"x"], metadata=metadata)
    async with (
        shared.async_client() as async_client,
        secure_aio_channel(target, client=async_client, audience="payments", server_name=NAME) as async_channel,
    ):
        with pytest.raises(ConfigError, match="already"):
            await call_async(async_channel, kind, [b"x"], metadata=metadata)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_for_which_there_is_no_token_fails_like_any_call(kind: str, scene: Scene):
    """One error in both stacks: a `grpc.RpcError` with code and reason, and the `TokenError` as its cause."""

    def check(error: NoTokenError, code: grpc.StatusCode, reason: str, cause: type[Exception]) -> None:
        assert isinstance(error, grpc.RpcError)
        assert (code, reason) == (error.code(), reason_of(error))
        assert isinstance(error.__cause__, cause)
        assert error.details().startswith("no token for audience payments")
        assert 1 == error.details().count("no token for")

    async def both(code: grpc.StatusCode, reason: str, cause: type[Exception]) -> None:
        with (
            scene.client() as client,
            secure_channel("127.0.0.1:9", client=client, audience="payments", server_name=NAME) as channel,
        ):
            with pytest.raises(NoTokenError) as failed:
                await asyncio.to_thread(call, channel, kind, [b"x"])
            check(failed.value, code, reason, cause)
        async with (
            scene.async_client() as async_client,
            secure_aio_channel(
                "127.0.0.1:9", client=async_client, audience="payments", server_name=NAME
            ) as async_channel,
        ):
            with pytest.raises(NoTokenError) as failed:
                await call_async(async_channel, kind, [b"x"])
            check(failed.value, code, reason, cause)

    scene.broker.token_faults.deny("NOT_GRANTED")
    await both(grpc.StatusCode.UNAUTHENTICATED, "NOT_GRANTED", RequestDeniedError)


async def test_a_call_ends_at_its_deadline_while_it_waits_for_a_token(scene: Scene):
    """The broker hangs; the call has half a second, and that is how long it takes."""
    scene.broker.token_faults.hang()
    with (
        scene.client() as client,
        secure_channel("127.0.0.1:9", client=client, audience="payments", server_name=NAME) as channel,
    ):
        make = channel.unary_unary(method("unary_unary"))
        started = time.monotonic()
        with pytest.raises(NoTokenError) as failed:
            await asyncio.to_thread(make, b"x", timeout=0.5)
        assert grpc.StatusCode.DEADLINE_EXCEEDED is failed.value.code()
        assert isinstance(failed.value.__cause__, BrokerUnavailableError)
        failure = await asyncio.to_thread(lambda: make.future(b"x", timeout=0.1).exception())
        assert isinstance(failure, NoTokenError)
    async with (
        scene.async_client() as async_client,
        secure_aio_channel("127.0.0.1:9", client=async_client, audience="payments", server_name=NAME) as async_channel,
    ):
        with pytest.raises(NoTokenError) as failed:
            await async_channel.unary_unary(method("unary_unary"))(b"x", timeout=0.5)
        assert grpc.StatusCode.DEADLINE_EXCEEDED is failed.value.code()
    assert time.monotonic() - started < 5
    scene.broker.token_faults.clear()


async def test_the_other_ways_to_call_attach_a_token_too(target: str, shared: Scene):
    """`with_call`, `future`, and asyncio's `read` and `write`; compression and deadline are passed on."""
    with (
        shared.client() as client,
        secure_channel(target, client=client, audience="payments", server_name=NAME) as channel,
    ):
        make = channel.unary_unary(method("unary_unary"))
        answer, made = await asyncio.to_thread(make.with_call, b"x", timeout=10, compression=grpc.Compression.Gzip)
        assert answer.startswith(b"x from")
        assert grpc.StatusCode.OK is made.code()
        assert answer == await asyncio.to_thread(make.future(b"x").result)
    async with (
        shared.async_client() as async_client,
        secure_aio_channel(target, client=async_client, audience="payments", server_name=NAME) as async_channel,
    ):
        stream = async_channel.stream_stream(method("stream_stream"))(compression=grpc.Compression.Gzip)
        await stream.write(b"x")
        assert answer == await stream.read()
        await stream.done_writing()
        assert grpc.aio.EOF is await stream.read()
        assert grpc.StatusCode.OK is await stream.code()


async def test_a_channel_goes_to_the_server_that_it_names_only(target: str, shared: Scene):
    """T25: another name in the certificate, and neither the call nor the token goes out."""
    with (
        shared.client() as client,
        secure_channel(target, client=client, audience="payments", server_name="bank.shop.svc.prod.example") as channel,
    ):
        with pytest.raises(grpc.RpcError) as failed:
            await asyncio.to_thread(call, channel, "unary_unary", [b"x"])
        assert grpc.StatusCode.UNAVAILABLE is failed.value.code()


async def test_what_nobody_grants_is_refused_when_the_channel_is_made(shared: Scene):
    """A scope with a space, or scopes in one text, would fail at each call."""
    with shared.client() as client:
        with pytest.raises(ConfigError, match="scope"):
            secure_channel("127.0.0.1:9", client=client, audience="payments", scopes=["a b"], server_name=NAME)
        with pytest.raises(TypeError, match="give a list"):
            secure_channel("127.0.0.1:9", client=client, audience="payments", scopes="charge", server_name=NAME)
    async with shared.async_client() as async_client:
        with pytest.raises(ConfigError, match="audience"):
            secure_aio_channel("127.0.0.1:9", client=async_client, audience="", server_name=NAME)
