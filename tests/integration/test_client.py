"""`Client` and `AsyncClient` against a broker over real mutual TLS, with the faults that a broker has."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

import grpc
import pytest

from carnet.cache import CacheSettings
from carnet.errors import BrokerUnavailableError, ConfigError, RequestDeniedError
from carnet.identity import Identity
from carnet.source import AsyncClient, Client
from carnet.testing.ca import CertificateAuthority
from carnet.verify import Expectations, verify_token
from support.broker_stub import BrokerStub

ORDERS = "spiffe://prod.example/ns/shop/sa/orders"
QUICK = CacheSettings(
    min_interval=timedelta(milliseconds=100),
    first_backoff=timedelta(milliseconds=50),
    max_backoff=timedelta(milliseconds=400),
)
SOON = timedelta(milliseconds=300)

MakeClient = Callable[..., Client]
MakeAsyncClient = Callable[..., AsyncClient]


@pytest.fixture(name="ca", scope="module")
def _ca() -> CertificateAuthority:
    return CertificateAuthority.create()


@pytest.fixture(name="ca_file", scope="module")
def _ca_file(ca: CertificateAuthority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    path.write_bytes(ca.root_pem)
    return path


@pytest.fixture(name="identity", scope="module")
def _identity(ca: CertificateAuthority) -> Identity:
    return identity_of(ca)


@pytest.fixture(name="broker")
def _broker(ca: CertificateAuthority) -> Iterator[BrokerStub]:
    with BrokerStub.start(ca) as broker:
        yield broker


@pytest.fixture(name="make_client")
def _make_client(broker: BrokerStub, identity: Identity, ca_file: Path) -> Iterator[MakeClient]:
    clients = []

    def make(**settings: object) -> Client:
        given = {"brokers": broker.target, "identity": identity, "ca_file": ca_file, "cache": QUICK}
        clients.append(Client(**(given | settings)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture(name="make_async_client")
def _make_async_client(broker: BrokerStub, identity: Identity, ca_file: Path) -> MakeAsyncClient:
    def make(**settings: object) -> AsyncClient:
        given = {"brokers": broker.target, "identity": identity, "ca_file": ca_file, "cache": QUICK}
        return AsyncClient(**(given | settings))

    return make


@pytest.fixture(name="workload")
def _workload(broker: BrokerStub, ca: CertificateAuthority, ca_file: Path, tmp_path: Path) -> dict[str, str]:
    """What the environment of a workload holds."""
    cert_file, key_file = ca.issue(ORDERS).write(tmp_path, "orders")
    return {
        "CARNET_BROKER": broker.target,
        "CARNET_CERT_FILE": str(cert_file),
        "CARNET_KEY_FILE": str(key_file),
        "CARNET_CA_FILE": str(ca_file),
    }


def identity_of(ca: CertificateAuthority, **window: datetime) -> Identity:
    """A certificate of orders from `ca`."""
    issued = ca.issue(ORDERS, **window)
    return Identity.parse(issued.certificate_pem, issued.private_key_pem)


def eventually(condition: Callable[[], bool], *, within: float = 10.0) -> bool:
    """Whether `condition` came true in time."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


async def eventually_async(condition: Callable[[], bool], *, within: float = 10.0) -> bool:
    """Whether `condition` came true in time, with the loop free to run."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def audiences(broker: BrokerStub) -> list[str]:
    """What the broker was asked for, in order."""
    return [call.audience for call in broker.issue_calls]


class TestClient:
    """Code that blocks."""

    def test_token_is_good_at_its_audience(
        self, make_client: MakeClient, broker: BrokerStub, identity: Identity
    ) -> None:
        """The token passes the verifier's own check, bound to the certificate that it was asked for with."""
        token = make_client().get_token("payments", scopes=["charge"])
        claims = verify_token(
            token.value,
            keys=broker.keys,
            expectations=Expectations(broker.issuer, "payments"),
            peer_thumbprint=identity.thumbprint,
            now=datetime.now(UTC),
        )
        assert (ORDERS, ("charge",)) == (str(claims.subject), claims.scopes)
        assert ("payments", ("charge",), identity.thumbprint) == (
            token.audience,
            token.scopes,
            token.identity_thumbprint,
        )
        assert abs(token.expires_at - claims.expires_at) < timedelta(seconds=3)

    def test_token_is_kept(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """A second caller gets the same token, and the broker is not asked again."""
        client = make_client()
        assert client.get_token("payments") is client.get_token("payments")
        assert ["payments"] == audiences(broker)

    def test_scopes_and_life_are_asked_for(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """What the caller wants goes to the broker; each wish is a token of its own."""
        client = make_client()
        token = client.get_token("payments", scopes=["refund", "charge"], ttl=timedelta(seconds=60))
        client.get_token("payments", scopes=["charge", "refund"])
        (first, second) = broker.issue_calls
        assert (("charge", "refund"), timedelta(seconds=60)) == (first.scopes, first.ttl)
        assert second.ttl is None
        assert timedelta(seconds=50) < token.expires_at - datetime.now(UTC) <= timedelta(seconds=60)

    def test_64_threads_that_ask_at_once_make_one_call(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """One request in flight is shared by all threads."""
        client, start = make_client(), threading.Barrier(64)
        broker.token_faults.slow(0.3)

        def ask(_: int) -> str:
            start.wait()
            return client.get_token("payments").value

        with ThreadPoolExecutor(64) as pool:
            values = set(pool.map(ask, range(64)))
        assert 1 == len(values)
        assert ["payments"] == audiences(broker)

    def test_spire_5994_valid_token_comes_at_once_while_the_broker_hangs(
        self, make_client: MakeClient, broker: BrokerStub
    ) -> None:
        """With the broker black-holed and a refresh hanging, a caller with 200 ms has its token in under 5 ms."""
        broker.life = timedelta(seconds=20)
        broker.refresh_in = timedelta()
        client = make_client(cache=CacheSettings(min_interval=timedelta(0)))
        token = client.get_token("payments", ttl=timedelta(seconds=4))
        broker.token_faults.hang()
        assert eventually(lambda: len(broker.issue_calls) == 2), "the refresh hangs now"
        times = []
        for _ in range(50):
            started = time.perf_counter()
            again = client.get_token("payments", ttl=timedelta(seconds=4), timeout=timedelta(milliseconds=200))
            times.append(time.perf_counter() - started)
            assert token is again
        assert median(times) < 0.005

    def test_token_is_replaced_before_it_ends(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """The background fetches the next token while the old one is still good; no caller waits for it."""
        broker.life = timedelta(seconds=2)
        client = make_client()
        first = client.get_token("payments")
        assert eventually(lambda: client.get_token("payments") is not first)
        assert datetime.now(UTC) < first.expires_at
        assert 2 == len(broker.issue_calls)

    def test_token_that_nobody_uses_is_not_replaced_for_ever(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """After a life without a caller the refreshing ends, and the thread with it."""
        broker.life = timedelta(milliseconds=400)
        make_client().get_token("payments")
        assert eventually(lambda: "carnet-refresh" not in {thread.name for thread in threading.enumerate()})
        calls = len(broker.issue_calls)
        time.sleep(0.5)
        assert calls == len(broker.issue_calls) <= 3

    def test_idle_token_is_refreshed_once_it_is_used_again(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """A caller that comes back late still gets the idle token at once, and the refreshing goes on."""
        broker.life = timedelta(seconds=1)
        client = make_client()
        client.get_token("payments")
        assert eventually(lambda: len(broker.issue_calls) == 2)
        time.sleep(0.85)  # Past the time for a third, which nobody's use asks for; the second is still good.
        assert 2 == len(broker.issue_calls)
        client.get_token("payments")
        assert eventually(lambda: len(broker.issue_calls) == 3)

    def test_identity_that_is_no_longer_used_is_let_go(
        self, make_client: MakeClient, broker: BrokerStub, ca: CertificateAuthority, identity: Identity
    ) -> None:
        """After a renewal the old certificate, and the connection that shows it, do not stay for ever."""
        broker.life = timedelta(milliseconds=400)
        client, old = make_client(), identity_of(ca)
        client.get_token("payments", identity=old)
        engine = next(iter(client._engines.values()))
        assert {old.thumbprint} == {where[1] for where in engine._connections._connections}

        def only_own_is_left() -> bool:
            client.get_token("payments")
            return {identity.thumbprint} == set(engine._identities)

        assert eventually(only_own_is_left)
        assert {identity.thumbprint} == {where[1] for where in engine._connections._connections}

    def test_valid_token_outlives_the_broker(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """A dead broker costs nothing while the token lives; then the error is typed; then all recovers by itself."""
        broker.life = timedelta(seconds=2)
        client = make_client()
        first = client.get_token("payments")
        broker.down()
        while datetime.now(UTC) < first.expires_at - timedelta(milliseconds=200):
            assert first is client.get_token("payments", timeout=SOON)
            time.sleep(0.02)
        time.sleep(0.3)
        with pytest.raises(BrokerUnavailableError, match="no broker answered"):
            client.get_token("payments", timeout=SOON)
        broker.up()
        assert first is not client.get_token("payments")

    def test_refusal_is_typed_and_remembered(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """The broker's reason reaches the caller; asking again at once does not go out."""
        client = make_client(cache=CacheSettings())
        broker.token_faults.deny("NOT_GRANTED")
        for _ in range(3):
            with pytest.raises(
                RequestDeniedError, match=r"payments as spiffe://prod\.example/\S+: .+ \(NOT_GRANTED\)"
            ) as caught:
                client.get_token("payments")
            assert "NOT_GRANTED" == caught.value.reason
        assert ["payments"] == audiences(broker)

    def test_refusal_ends_with_the_policy(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """A right that was granted in the meantime is found after the interval."""
        client = make_client()
        broker.token_faults.deny()
        with pytest.raises(RequestDeniedError):
            client.get_token("payments")
        broker.token_faults.clear()
        time.sleep(0.15)
        assert "payments" == client.get_token("payments").audience

    def test_refused_refresh_leaves_the_token(
        self, make_client: MakeClient, broker: BrokerStub, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A token whose right was taken away is given out to its end, and the log says that its refresh failed."""
        broker.life = timedelta(seconds=2)
        client = make_client()
        first = client.get_token("payments")
        broker.token_faults.deny()
        assert eventually(lambda: "NOT_GRANTED" in caplog.text)
        assert first is client.get_token("payments")
        assert first.value not in caplog.text

    @pytest.mark.parametrize(
        "code",
        [
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.FAILED_PRECONDITION,
        ],
    )
    def test_each_code_that_waiting_does_not_change_is_a_refusal(
        self, make_client: MakeClient, broker: BrokerStub, code: grpc.StatusCode
    ) -> None:
        """The caller is told no, with the reason of the broker."""
        broker.token_faults.deny("SOME_REASON", code=code)
        with pytest.raises(RequestDeniedError) as caught:
            make_client().get_token("payments")
        assert "SOME_REASON" == caught.value.reason

    @pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED])
    def test_each_other_code_is_unavailable(
        self, make_client: MakeClient, broker: BrokerStub, code: grpc.StatusCode
    ) -> None:
        """What another broker, or a later try, may answer otherwise is worth a retry."""
        broker.token_faults.deny("SOME_REASON", code=code)
        with pytest.raises(BrokerUnavailableError):
            make_client().get_token("payments", timeout=SOON)

    def test_broker_that_asks_for_patience_gets_it(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """RetryInfo is kept: no second call before the time, and a caller with less time is told at once."""
        broker.token_faults.unavailable(retry_after=timedelta(seconds=30))
        client = make_client()
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(BrokerUnavailableError):
                client.get_token("payments", timeout=timedelta(seconds=5))
            assert time.monotonic() - started < 4
        assert ["payments"] == audiences(broker)

    def test_caller_waits_for_a_broker_that_comes_up(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """Within its time a caller is retried for: a broker that restarts costs seconds, not an error."""
        broker.down()
        client = make_client()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.get_token, "payments", timeout=timedelta(seconds=20))
            time.sleep(0.4)
            broker.up()
            assert "payments" == waiting.result().audience

    def test_caller_with_little_time_leaves_the_request_to_the_others(
        self, make_client: MakeClient, broker: BrokerStub
    ) -> None:
        """A timeout ends the waiting and not the request: the next caller finds its token."""
        broker.token_faults.slow(0.6)
        client = make_client()
        started = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match=r"no answer within 0\.2 s"):
            client.get_token("payments", timeout=timedelta(milliseconds=200))
        assert time.monotonic() - started < 0.55
        client.get_token("payments")
        assert ["payments"] == audiences(broker)

    def test_next_broker_is_asked_when_one_is_down(
        self, make_client: MakeClient, broker: BrokerStub, ca: CertificateAuthority
    ) -> None:
        """Of two brokers one is enough, whichever comes first."""
        with BrokerStub.start(ca) as other:
            other.down()
            client = make_client(brokers=f"{other.target},{broker.target}")
            for audience in ("payments", "ledger"):
                assert audience == client.get_token(audience).audience

    def test_next_broker_is_asked_when_one_hangs(
        self, make_client: MakeClient, broker: BrokerStub, ca: CertificateAuthority
    ) -> None:
        """A silent broker costs one attempt; after that the other one is asked first."""
        with BrokerStub.start(ca) as other:
            other.token_faults.hang()
            client = make_client(brokers=[other.target, broker.target], attempt_timeout=timedelta(milliseconds=300))
            for number in range(4):
                client.get_token(f"audience-{number}")
            assert len(other.issue_calls) <= 1
            other.token_faults.clear()

    def test_refusal_is_not_taken_to_another_broker(
        self, make_client: MakeClient, broker: BrokerStub, ca: CertificateAuthority
    ) -> None:
        """One broker's no is the answer: the others have the same policy."""
        with BrokerStub.start(ca) as other:
            for one in (broker, other):
                one.token_faults.deny()
            with pytest.raises(RequestDeniedError):
                make_client(brokers=[broker.target, other.target]).get_token("payments")
            assert 1 == len(broker.issue_calls) + len(other.issue_calls)

    def test_answer_that_makes_no_sense_is_none(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """A token that has ended when it comes is not given to anybody."""
        broker.life = timedelta(0)
        with pytest.raises(BrokerUnavailableError, match="its answer is not that of a broker"):
            make_client().get_token("payments", timeout=SOON)

    def test_other_identity_asks_with_its_own_certificate(
        self, make_client: MakeClient, broker: BrokerStub, ca: CertificateAuthority, identity: Identity
    ) -> None:
        """A call that names another identity gets a token bound to that one, over a connection of its own."""
        client, renewed = make_client(), identity_of(ca)
        tokens = [client.get_token("payments"), client.get_token("payments", identity=renewed)]
        expected = [identity.thumbprint, renewed.thumbprint]
        assert expected == [token.identity_thumbprint for token in tokens]
        assert expected == [call.thumbprint for call in broker.issue_calls]

    @pytest.mark.parametrize(
        ("wish", "named"),
        [
            ({"audience": "pay ments"}, "audience"),
            ({"audience": ""}, "audience"),
            ({"audience": "payments", "scopes": ["a b"]}, "scope"),
            ({"audience": "payments", "ttl": timedelta(0)}, "ttl"),
        ],
    )
    def test_wish_that_nobody_can_grant_does_not_go_out(
        self, make_client: MakeClient, broker: BrokerStub, wish: dict[str, object], named: str
    ) -> None:
        """Names that no token can hold and lives of nothing are the caller's mistake, told at once."""
        with pytest.raises(ConfigError, match=named):
            make_client().get_token(**wish)
        assert [] == broker.issue_calls

    def test_single_text_as_scopes_is_refused(self, make_client: MakeClient) -> None:
        """Scopes are a list: a text would be read as one scope for each letter."""
        with pytest.raises(TypeError, match=r"give a list, for instance \['charge'\]"):
            make_client().get_token("payments", scopes="charge")

    def test_close_ends_waiting_callers_and_the_thread(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """Nobody is left hanging: callers that wait hear of it, later ones too, and no thread stays behind."""
        client = make_client()
        client.get_token("payments")
        broker.token_faults.hang()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.get_token, "ledger")
            assert eventually(lambda: len(broker.issue_calls) == 2)
            client.close()
            with pytest.raises(BrokerUnavailableError, match="the client was closed"):
                waiting.result(timeout=5)
        with pytest.raises(BrokerUnavailableError, match="the client was closed"):
            client.get_token("payments")
        assert "carnet-refresh" not in {thread.name for thread in threading.enumerate()}
        client.close()

    @pytest.mark.parametrize(
        ("wrong", "hint"),
        [
            ("ended", "your certificate ended at 20"),
            ("not yet", "your certificate begins at 20"),
            ("untrusted", "the broker may not trust your certificate"),
            ("ca", "is not from your authorities, check CARNET_CA_FILE"),
            ("name", "the broker's certificate is not for other.example"),
            ("down", "check CARNET_BROKER"),
        ],
    )
    def test_failed_connection_comes_with_a_hint(
        self,
        make_client: MakeClient,
        broker: BrokerStub,
        ca: CertificateAuthority,
        tmp_path: Path,
        wrong: str,
        hint: str,
    ) -> None:
        """gRPC says "Socket closed" for most of these; the error says what this side knows, and what to do."""
        stranger = CertificateAuthority.create()
        (tmp_path / "other.pem").write_bytes(stranger.root_pem)
        now, hour = datetime.now(UTC), timedelta(hours=1)
        if wrong == "down":
            broker.down()
        settings = {
            "ended": {"identity": identity_of(ca, not_before=now - 2 * hour, not_after=now - hour)},
            "not yet": {"identity": identity_of(ca, not_before=now + hour, not_after=now + 2 * hour)},
            "untrusted": {"identity": identity_of(stranger)},
            "ca": {"ca_file": tmp_path / "other.pem"},
            "name": {"broker_name": "other.example"},
            "down": {},
        }
        with pytest.raises(BrokerUnavailableError, match=hint):
            make_client(**settings[wrong]).get_token("payments", timeout=timedelta(seconds=1))

    def test_everything_comes_from_the_environment(
        self, workload: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A service that sets the variables writes `Client()`."""
        for variable, value in workload.items():
            monkeypatch.setenv(variable, value)
        with Client() as client:
            assert "payments" == client.get_token("payments").audience

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"brokers": ""}, "brokers is empty"),
            ({"brokers": "nowhere"}, "brokers: 'nowhere' has no port"),
            ({"ca_file": "/nowhere/ca.pem"}, "CA file /nowhere/ca.pem does not exist"),
            ({"broker_name": "a b"}, "broker_name is 'a b'"),
            ({"cert_file": "/nowhere/cert.pem"}, "identity=... is given together"),
            ({"timeout": timedelta(0)}, "timeout and attempt_timeout"),
            ({"attempt_timeout": timedelta(seconds=-1)}, "timeout and attempt_timeout"),
        ],
    )
    def test_wrong_setting_is_told_when_the_client_is_made(
        self, make_client: MakeClient, settings: dict[str, object], named: str
    ) -> None:
        """Nothing waits for the first call to find out that a file is missing."""
        with pytest.raises(ConfigError) as caught:
            make_client(**settings)
        assert named in str(caught.value)

    def test_client_shows_who_and_where_but_no_secret(self, make_client: MakeClient, broker: BrokerStub) -> None:
        """The repr of a client is fit for a log."""
        client = make_client()
        assert f"<Client {ORDERS} brokers={broker.target}>" == repr(client)
        assert ORDERS == str(client.identity.spiffe_id)


def run_script(text: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a Python program of its own, as a service is one."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", text],
        env=variables | {"PYTHONPATH": str(Path(__file__).parents[2] / "client")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


FORKING = """
import os
from carnet import Client

client = Client()
{before}
if os.fork() == 0:
    kept = client.get_token("payments").value
    print("child", client.get_token("ledger").audience, flush=True)
    print("same" if kept == {kept} else "other", flush=True)
    os._exit(0)
status = os.wait()[1]
print("parent", status, client.get_token("stock").audience)
"""


@pytest.mark.parametrize(
    ("before", "kept", "child"),
    [
        ("first = client.get_token('payments').value", "first", "same"),
        ("first = None", "first", "other"),
    ],
    ids=["used before", "made before"],
)
def test_client_goes_on_in_both_processes_after_a_fork(
    workload: dict[str, str], broker: BrokerStub, before: str, kept: str, child: str
) -> None:
    """The child has the tokens of before and connections of its own (gunicorn's preload); the parent goes on too."""
    done = run_script(FORKING.format(before=before, kept=kept), workload)
    assert ["child ledger", child, "parent 0 stock"] == done.stdout.splitlines(), done.stderr
    assert ["ledger", "payments", "stock"] == sorted(audiences(broker))


FORGETFUL = """
from datetime import timedelta
from carnet import BrokerUnavailableError, Client

client = Client()
print(client.get_token("payments").audience)
try:
    client.get_token("ledger", timeout=timedelta(milliseconds=100))
except BrokerUnavailableError:
    print("waiting no longer")
"""


def test_process_that_never_closes_its_client_ends_in_silence(workload: dict[str, str], broker: BrokerStub) -> None:
    """A script that forgets close() ends at once with a request under way: exit code 0, nothing on stderr."""
    broker.token_faults.slow(0.8)
    done = run_script(FORGETFUL, workload)
    assert (0, "") == (done.returncode, done.stderr)
    assert ["payments", "waiting no longer"] == done.stdout.splitlines()


class TestAsyncClient:
    """The same promises, in an event loop."""

    async def test_token_is_good_and_kept(self, make_async_client: MakeAsyncClient, broker: BrokerStub) -> None:
        """A second task gets the same token, which the verifier accepts."""
        async with make_async_client() as client:
            token = await client.get_token("payments", scopes=["charge"], ttl=timedelta(seconds=60))
            assert token is await client.get_token("payments", scopes=["charge"], ttl=timedelta(seconds=60))
        claims = verify_token(
            token.value,
            keys=broker.keys,
            expectations=Expectations(broker.issuer, "payments"),
            peer_thumbprint=token.identity_thumbprint,
            now=datetime.now(UTC),
        )
        assert ("charge",) == claims.scopes
        assert ["payments"] == audiences(broker)

    async def test_1000_tasks_that_ask_at_once_make_one_call(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub
    ) -> None:
        """One request in flight is shared by all tasks."""
        broker.token_faults.slow(0.3)
        async with make_async_client() as client:
            tokens = await asyncio.gather(*(client.get_token("payments") for _ in range(1000)))
        assert 1 == len({token.value for token in tokens})
        assert ["payments"] == audiences(broker)

    async def test_cancelled_caller_leaves_the_request_to_the_others(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub
    ) -> None:
        """Neither the one that started the request nor the last that waits takes it along when it is cancelled."""
        broker.token_faults.slow(0.5)
        async with make_async_client() as client:
            first = asyncio.create_task(client.get_token("payments"))
            await asyncio.sleep(0.05)
            second = asyncio.create_task(client.get_token("payments"))
            await asyncio.sleep(0.05)
            first.cancel()
            await asyncio.sleep(0.05)
            assert first.cancelled()
            assert "payments" == (await second).audience
            third = asyncio.create_task(client.get_token("ledger"))
            await asyncio.sleep(0.05)
            third.cancel()
            assert "ledger" == (await client.get_token("ledger")).audience
        assert ["payments", "ledger"] == audiences(broker)

    async def test_spire_5994_valid_token_comes_at_once_while_the_broker_hangs(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub
    ) -> None:
        """With the broker black-holed and a refresh hanging, a task with 200 ms has its token in under 5 ms."""
        broker.life, broker.refresh_in = timedelta(seconds=4), timedelta()
        async with make_async_client(cache=CacheSettings(min_interval=timedelta(0))) as client:
            token = await client.get_token("payments")
            broker.token_faults.hang()
            assert await eventually_async(lambda: len(broker.issue_calls) == 2), "the refresh hangs now"
            times = []
            for _ in range(50):
                started = time.perf_counter()
                assert token is await client.get_token("payments", timeout=timedelta(milliseconds=200))
                times.append(time.perf_counter() - started)
            assert median(times) < 0.005
            broker.token_faults.clear()

    async def test_token_is_replaced_before_it_ends(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub
    ) -> None:
        """The timer fetches the next token while the old one is still good."""
        broker.life = timedelta(seconds=2)
        async with make_async_client() as client:
            first = latest = await client.get_token("payments")
            while latest is first:
                assert datetime.now(UTC) < first.expires_at
                await asyncio.sleep(0.02)
                latest = await client.get_token("payments")
        assert 2 == len(broker.issue_calls)

    async def test_idle_token_is_refreshed_once_it_is_used_again(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub
    ) -> None:
        """A task that comes back late still gets the idle token at once, and the refreshing goes on."""
        broker.life = timedelta(seconds=1)
        async with make_async_client() as client:
            await client.get_token("payments")
            assert await eventually_async(lambda: len(broker.issue_calls) == 2)
            await asyncio.sleep(0.85)  # Past the time for a third, which nobody's use asks for.
            assert 2 == len(broker.issue_calls)
            await client.get_token("payments")
            assert await eventually_async(lambda: len(broker.issue_calls) == 3)

    async def test_identity_that_is_no_longer_used_is_let_go(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub, ca: CertificateAuthority, identity: Identity
    ) -> None:
        """After a renewal the old certificate, and the connection that shows it, do not stay for ever."""
        broker.life = timedelta(milliseconds=400)
        old = identity_of(ca)
        async with make_async_client() as client:
            await client.get_token("payments", identity=old)
            engine = client._engine
            assert {old.thumbprint} == {where[1] for where in engine._connections._connections}
            deadline = time.monotonic() + 10
            while {identity.thumbprint} != set(engine._identities):
                assert time.monotonic() < deadline
                await client.get_token("payments")
                await asyncio.sleep(0.01)
            assert {identity.thumbprint} == {where[1] for where in engine._connections._connections}

    async def test_valid_token_outlives_the_broker(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub
    ) -> None:
        """A dead broker costs nothing while the token lives; then the error is typed; then all recovers by itself."""
        broker.life = timedelta(seconds=2)
        async with make_async_client() as client:
            first = await client.get_token("payments")
            broker.down()
            while datetime.now(UTC) < first.expires_at - timedelta(milliseconds=200):
                assert first is await client.get_token("payments", timeout=SOON)
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.3)
            with pytest.raises(BrokerUnavailableError, match="no broker answered"):
                await client.get_token("payments", timeout=SOON)
            broker.up()
            assert first is not await client.get_token("payments")

    async def test_refusal_is_typed_and_remembered(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub
    ) -> None:
        """The broker's reason reaches the caller; asking again at once does not go out."""
        broker.token_faults.deny("SCOPE_NOT_GRANTED")
        async with make_async_client(cache=CacheSettings()) as client:
            for _ in range(3):
                with pytest.raises(RequestDeniedError) as caught:
                    await client.get_token("payments")
                assert "SCOPE_NOT_GRANTED" == caught.value.reason
        assert ["payments"] == audiences(broker)

    async def test_refused_refresh_leaves_the_token(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A token whose right was taken away is given out to its end, and the log says that its refresh failed."""
        broker.life = timedelta(seconds=2)
        async with make_async_client() as client:
            first = await client.get_token("payments")
            broker.token_faults.deny()
            assert await eventually_async(lambda: "NOT_GRANTED" in caplog.text)
            assert first is await client.get_token("payments")
        assert first.value not in caplog.text

    async def test_next_broker_is_asked_when_one_hangs(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub, ca: CertificateAuthority
    ) -> None:
        """A silent broker costs one attempt; after that the other one is asked first."""
        with BrokerStub.start(ca) as other:
            other.token_faults.hang()
            brokers = [other.target, broker.target]
            async with make_async_client(brokers=brokers, attempt_timeout=timedelta(milliseconds=300)) as client:
                for number in range(4):
                    await client.get_token(f"audience-{number}")
            assert len(other.issue_calls) <= 1
            other.token_faults.clear()

    async def test_caller_waits_for_a_broker_that_comes_up(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub
    ) -> None:
        """Within its time a caller is retried for."""
        broker.down()
        async with make_async_client() as client:
            waiting = asyncio.create_task(client.get_token("payments", timeout=timedelta(seconds=20)))
            await asyncio.sleep(0.4)
            broker.up()
            assert "payments" == (await waiting).audience

    async def test_caller_with_little_time_leaves_the_request_to_the_others(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub
    ) -> None:
        """A timeout ends the waiting and not the request."""
        broker.token_faults.slow(0.6)
        async with make_async_client() as client:
            with pytest.raises(BrokerUnavailableError, match=r"no answer within 0\.2 s"):
                await client.get_token("payments", timeout=timedelta(milliseconds=200))
            await client.get_token("payments")
        assert ["payments"] == audiences(broker)

    async def test_close_ends_waiting_callers(self, make_async_client: MakeAsyncClient, broker: BrokerStub) -> None:
        """Callers that wait for a request, or for the time to ask again, hear that the client was closed."""
        broker.token_faults.hang()
        client = make_async_client()
        waiting = asyncio.create_task(client.get_token("ledger"))
        assert await eventually_async(lambda: len(broker.issue_calls) == 1)
        await client.close()
        with pytest.raises(BrokerUnavailableError, match="the client was closed"):
            await waiting
        with pytest.raises(BrokerUnavailableError, match="the client was closed"):
            await client.get_token("payments")
        await client.close()

    async def test_close_ends_callers_that_were_told_to_wait(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub
    ) -> None:
        """A caller that waits for the end of a pause does not outlive the client."""
        broker.token_faults.unavailable(retry_after=timedelta(seconds=20))
        client = make_async_client()
        waiting = asyncio.create_task(client.get_token("ledger", timeout=timedelta(seconds=60)))
        assert await eventually_async(lambda: len(broker.issue_calls) == 1)
        await asyncio.sleep(0.2)
        await client.close()
        with pytest.raises(BrokerUnavailableError, match="the client was closed"):
            await asyncio.wait_for(waiting, 5)

    def test_client_goes_on_in_the_next_loop(self, make_async_client: MakeAsyncClient, broker: BrokerStub) -> None:
        """A client outlives its loop: the next one has its tokens, and can fetch more."""
        client = make_async_client()
        first = asyncio.run(client.get_token("payments"))

        async def next_loop() -> None:
            assert first is await client.get_token("payments")
            assert "ledger" == (await client.get_token("ledger")).audience
            await client.close()

        asyncio.run(next_loop())
        assert ["payments", "ledger"] == audiences(broker)

    async def test_two_running_loops_are_refused(self, make_async_client: MakeAsyncClient) -> None:
        """A client in use in one loop says so in another, rather than fail inside of gRPC."""
        async with make_async_client() as client:
            await client.get_token("payments")
            with pytest.raises(RuntimeError, match="belongs to one event loop"):
                await asyncio.to_thread(asyncio.run, client.get_token("payments"))

    async def test_client_shows_who_and_where_but_no_secret(
        self, make_async_client: MakeAsyncClient, broker: BrokerStub
    ) -> None:
        """The repr of a client is fit for a log."""
        client = make_async_client()
        assert f"<AsyncClient {ORDERS} brokers={broker.target}>" == repr(client)
        assert ORDERS == str(client.identity.spiffe_id)
