"""Certificates, bundles and handshakes against a running broker: what changes while connections are open.

The table of wrong certificates itself is in test_wrong_certificates.py.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from carnet import Identity
from carnet.testing import CertificateAuthority
from carnet.testing.ca import private_key_pem, write_file
from carnet.v1 import token_pb2, token_pb2_grpc
from carnet_broker.core.workload import IdentityReason
from certificate_recipe import Presented, leaf, p256_key
from support.client_hello import answer_to_client_hello, client_hello
from support.http2 import PREFACE, ConnectionEndedError, connect, grpc_status_of_call, tls_connection
from support.mtls_server import Target, openssl_context, outcome
from support.running_broker import BROKER, BROKER_NAME, ORDERS, POLICY, RunningBroker, reason_of, start_broker
from support.vault import VaultPlace, prepare
from wrong_certificates import WRONG_CERTIFICATES, Expected, WrongCertificate

METHOD = "/carnet.v1.TokenService/IssueToken"
REQUEST = token_pb2.IssueTokenRequest(audience="payments").SerializeToString()
WIDE_POLICY = POLICY + "  - { workload: spiffe://prod.example/ns/shop/sa/**, audience: payments, scopes: [charge] }\n"
GENEROUS = {
    "limits": {"tokens_per_second": 5000, "token_burst": 5000},
    "log": {"lines_per_second": 5000},
}
KINDS = list(WRONG_CERTIFICATES.values())
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number:UserWarning")


@pytest.fixture(name="place", scope="module")
def _place(openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultPlace]:
    place = prepare(openbao, tmp_path_factory.mktemp("login"))
    yield place
    place.close()


@pytest.fixture(name="broker", scope="module")
def _broker(place: VaultPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """One for all tests that change none of its files."""
    directory = tmp_path_factory.mktemp("broker")
    settings = {**GENEROUS, "limits": {**GENEROUS["limits"], "handshake_timeout": "2s"}}
    with start_broker(place, directory, policy=WIDE_POLICY, settings=settings) as running:
        yield running


@pytest.fixture(name="own_broker")
def _own_broker(place: VaultPlace, tmp_path: Path) -> Iterator[RunningBroker]:
    """One whose files a test replaces."""
    with start_broker(place, tmp_path / "broker", policy=WIDE_POLICY, settings=GENEROUS) as running:
        yield running


def target_of(broker: RunningBroker) -> Target:
    """Return its token listener."""
    return Target(broker.addresses["tokens"], BROKER_NAME, broker.ca.root_pem, METHOD, REQUEST)


def status_of(channel: grpc.Channel) -> tuple[grpc.StatusCode, str]:
    """Ask for a token on an open channel; return the code, and the reason of a refusal."""
    try:
        stub = token_pb2_grpc.TokenServiceStub(channel)
        assert stub.IssueToken(token_pb2.IssueTokenRequest(audience="payments"), timeout=10).token
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code, "" if code is grpc.StatusCode.UNAVAILABLE else reason_of(error)
    return grpc.StatusCode.OK, ""


OK = (grpc.StatusCode.OK, "")
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
NO_HANDSHAKE = (grpc.StatusCode.UNAVAILABLE, "")


def status_of_new_connection(broker: RunningBroker, identity: Identity) -> tuple[grpc.StatusCode, str]:
    """Ask for a token over a new connection."""
    with broker.channel(identity) as channel:
        return status_of(channel)


def reloads(broker: RunningBroker, event: str = "reloaded") -> int:
    """Return how often the TLS files were taken up, or were not."""
    return sum(entry["event"] == event and entry["what"] == "tls" for entry in broker.log())


@contextmanager
def reloading(broker: RunningBroker, event: str = "reloaded") -> Iterator[None]:
    """Wait, after the block, until the broker has looked at the files that the block changed."""
    before = reloads(broker, event)
    yield
    broker.reload()
    broker.wait_for(lambda: reloads(broker, event) > before, event)


# -- T01 to T15: what callers, logs and the audit record are told ------------------------------------------------------


def test_t01_to_t15_every_accepted_twin_gets_a_token(broker):
    """With a grant for all names that they have: so each refusal of the table is about the one thing that is wrong."""
    twins = [kind for kind in KINDS if kind.expected is Expected.ACCEPT]

    def token_for(kind: WrongCertificate) -> bool:
        made = kind.build(broker.ca, datetime.now(UTC))
        identity = Identity.parse(made.chain_pem, made.private_key_pem)
        return bool(broker.issue("payments", ttl=timedelta(seconds=30), identity=identity).token)

    with ThreadPoolExecutor(4) as pool:
        assert [] == [kind.name for kind, good in zip(twins, pool.map(token_for, twins), strict=True) if not good]
    assert len(twins) > 80


def test_t02_to_t15_each_refusal_has_a_reason_in_the_log_and_none_for_the_caller(broker):
    """One constant answer; one line each in the log, with why; never an error that nobody meant."""
    refused = [kind for kind in KINDS if kind.expected is Expected.UNAUTHENTICATED and "-byte-" not in kind.name]
    known = len(broker.log())

    def told(kind: WrongCertificate) -> tuple[str, str]:
        made = kind.build(broker.ca, datetime.now(UTC))
        target = target_of(broker)
        context = openssl_context(target, made)
        with connect(target.address, context, server_name=BROKER_NAME) as connection:
            answer = connection.call(METHOD, REQUEST)
        return f"{answer.status} {answer.reason}", answer.headers["grpc-message"]

    with ThreadPoolExecutor(4) as pool:
        answers = Counter(pool.map(told, refused))
    text = "the certificate of this connection does not authenticate a workload"
    assert {("StatusCode.UNAUTHENTICATED UNAUTHENTICATED", text): len(refused)} == answers
    lines = [entry for entry in broker.log()[known:] if entry["event"] == "unauthenticated"]
    assert len(refused) == len(lines)
    assert {entry["reason"] for entry in lines} < set(IdentityReason)
    assert len({entry["reason"] for entry in lines}) > 8
    assert all(entry["cause"] for entry in lines)
    assert not [entry for entry in broker.log() if entry["event"] == "internal_error"]
    assert "INTERNAL" not in broker.get("/metrics")[1]
    assert broker.issue("payments").token


# -- T16: revocation lists ---------------------------------------------------------------------------------------------


def test_t16_a_serial_number_that_is_revoked_is_refused_at_the_next_call(place, tmp_path):
    """On its open connection and on new ones, once the file is replaced; the same one of another issuer is not."""
    ca = CertificateAuthority.create()
    other = ca.with_new_intermediate()
    directory = tmp_path / "broker"
    directory.mkdir()
    for name, authority in (("own", ca), ("other", other)):
        write_file(directory / f"{name}.crl", authority.crl_pem())
    files = {
        "certificate_file": "broker.pem",
        "key_file": "broker-key.pem",
        "client_ca_file": "ca.pem",
        "crl_files": ["own.crl", "other.crl"],
    }
    with start_broker(place, directory, ca=ca, settings={**GENEROUS, "tls": files}) as broker:
        revoked = ca.issue(ORDERS)
        orders = Identity.parse(revoked.certificate_pem, revoked.private_key_pem)
        serial = revoked.leaf.serial_number
        now = datetime.now(UTC)
        same = leaf(other, now, serial=serial)
        neighbour = Identity.parse(same.chain_pem, same.private_key_pem)
        with broker.channel(orders) as channel, broker.channel(neighbour) as other_channel:
            assert [OK, OK] == [status_of(channel), status_of(other_channel)]
            ca.revoke(revoked)
            with reloading(broker):
                write_file(directory / "own.crl", ca.crl_pem())
            assert [REFUSED, OK] == [status_of(channel), status_of(other_channel)]
        assert REFUSED == status_of_new_connection(broker, orders)
        assert OK == status_of_new_connection(broker, neighbour)
        reasons = [entry["reason"] for entry in broker.log() if entry["event"] == "unauthenticated"]
        assert [IdentityReason.REVOKED] * 2 == reasons


# -- T17, T18: bundles and certificates that change under open connections ---------------------------------------------


def test_t18_a_ca_that_was_removed_opens_nothing_also_with_a_session_of_before(own_broker):
    """Old and new CA overlap, then the old one goes: at the next call, in the handshake, and with a TLS session."""
    broker = own_broker
    new = CertificateAuthority.create()
    issued = new.issue(ORDERS)
    of_new = Identity.parse(issued.certificate_pem, issued.private_key_pem)
    of_old = broker.identity()
    target = target_of(broker)
    old = broker.ca.issue(ORDERS)
    context = openssl_context(target, Presented(old.certificate_pem, old.private_key_pem))
    assert NO_HANDSHAKE == status_of_new_connection(broker, of_new)
    with broker.channel(of_old) as channel:
        assert OK == status_of(channel)
        with reloading(broker):
            write_file(broker.ca_file, broker.ca.root_pem + new.root_pem)
        assert OK == status_of(channel)
        assert [OK, OK] == [status_of_new_connection(broker, identity) for identity in (of_old, of_new)]
        with tls_connection(target.address, context, server_name=BROKER_NAME) as connection:
            assert 0 == grpc_status_of_call(connection, METHOD, REQUEST)
            session = connection.session

        with reloading(broker):
            write_file(broker.ca_file, new.root_pem)
        assert REFUSED == status_of(channel)
    assert [NO_HANDSHAKE, OK] == [status_of_new_connection(broker, identity) for identity in (of_old, of_new)]
    with (
        pytest.raises((ssl.SSLError, ConnectionError)),
        tls_connection(target.address, context, server_name=BROKER_NAME, session=session) as connection,
    ):
        grpc_status_of_call(connection, METHOD, REQUEST)
    causes = [entry["reason"] for entry in broker.log() if entry["event"] == "unauthenticated"]
    assert [IdentityReason.UNTRUSTED] == causes


# -- T20, T21, T22: versions, suites, protocols ------------------------------------------------------------------------

ECDHE_ECDSA_AES_GCM = (0xC02B, 0xC02C)


def test_t20_tls_1_2_gets_the_constant_answer(broker):
    """UNAUTHENTICATED with its details, like any other refusal; the version is for the log."""
    target = target_of(broker)
    context = openssl_context(target, leaf(broker.ca, datetime.now(UTC)))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    known = len(broker.log())
    with connect(target.address, context, server_name=BROKER_NAME) as connection:
        answer = connection.call(METHOD, REQUEST)
    assert REFUSED == (answer.status, answer.reason)
    assert [IdentityReason.TLS_VERSION] == [entry.get("reason") for entry in broker.log()[known:]]


def test_t21_no_weak_cipher_suite_is_taken(broker):
    """Of all that TLS 1.2 has: no NULL, export, RC4, 3DES, CBC, anonymous or RSA key exchange, and no compression."""
    address = broker.addresses["tokens"]
    weak = [range(0x1300), [suite for suite in range(0xC000, 0xC100) if suite not in ECDHE_ECDSA_AES_GCM]]
    assert [None, None] == [answer_to_client_hello(address, client_hello(BROKER_NAME, some)) for some in weak]
    for suite in ECDHE_ECDSA_AES_GCM:
        hello = client_hello(BROKER_NAME, [*weak[1], suite], compression=b"\x01\x00")
        assert (suite, 0) == answer_to_client_hello(address, hello)


def test_t21_a_client_cannot_renegotiate(broker, tmp_path):
    """OpenSSL's client asks for it on a TLS 1.2 connection, and loses the connection."""
    identity = broker.identity()
    own = tmp_path / "own.pem"
    own.write_bytes(identity.private_key_pem + identity.certificate_chain_pem)
    command = ["openssl", "s_client", "-connect", broker.addresses["tokens"], "-servername", BROKER_NAME, "-tls1_2"]
    command += ["-cert", str(own), "-cert_chain", str(own), "-alpn", "h2", "-CAfile", str(broker.ca_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdin is not None
        process.stdin.write(b"R\n")
        process.stdin.flush()
        said = process.communicate(timeout=10)[0]
    assert b"Verify return code: 0 (ok)" in said
    assert b"RENEGOTIATING" in said
    assert b"error:" in said


@pytest.mark.parametrize("offered", [None, ["http/1.1"], ["grpc-exp"]])
def test_t22_a_connection_without_http_2_gets_no_answer(broker, offered):
    """ALPN is missing, or names something else: the connection ends, whatever is said on it."""
    target = target_of(broker)
    context = openssl_context(target, leaf(broker.ca, datetime.now(UTC)))
    if offered is not None:
        context.set_alpn_protocols(offered)
    host, _, port = target.address.rpartition(":")
    with (
        suppress(ssl.SSLError, ConnectionError),
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=BROKER_NAME) as secured,
    ):
        secured.sendall(PREFACE + b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n")
        assert b"" == secured.recv(1000)


@pytest.mark.parametrize(
    "first",
    [
        PREFACE,
        b"GET /carnet.v1.TokenService/IssueToken HTTP/1.1\r\nHost: broker\r\n\r\n",
        b"PROXY TCP4 127.0.0.1 127.0.0.1 1 1\r\n",
        b"\r\n\r\n\x00\r\nQUIT\n!\x11\x00\x00",
        b"\x16\x03\x01\xff\xff\x01\x00\xff\xfb" + b"x" * 70_000,
        b"\x16\x03\x01\x00\x00" * 1000,
        bytes(10_000),
    ],
    ids=["h2c", "http/1.1", "proxy v1", "proxy v2", "oversize record", "empty records", "zeros"],
)
def test_t22_t27_what_is_no_tls_is_not_answered(broker, first):
    """Nothing but an alert at most, and the connection ends."""
    assert len(what_comes_back(broker, first)) <= 7
    assert broker.issue("payments").token


def what_comes_back(broker: RunningBroker, first: bytes) -> bytes:
    """Send bytes to the token listener, and return all that it sends before it ends the connection."""
    host, _, port = broker.addresses["tokens"].rpartition(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection, suppress(ConnectionError):
        connection.sendall(first)
        while chunk := connection.recv(1000):
            received += chunk
    return received


# -- T23, T24: files that change ---------------------------------------------------------------------------------------


def _no_longer_there(broker: RunningBroker) -> None:
    broker.ca_file.unlink()


def _half_of_the_bundle(broker: RunningBroker) -> None:
    broker.ca_file.write_bytes(broker.ca.root_pem[: len(broker.ca.root_pem) // 2])


def _half_a_second_ca(broker: RunningBroker) -> None:
    broker.ca_file.write_bytes(broker.ca.root_pem + CertificateAuthority.create().root_pem[:300])


def _a_leaf_as_bundle(broker: RunningBroker) -> None:
    broker.ca_file.write_bytes(broker.ca.issue(ORDERS).certificate_pem)


def _another_key(broker: RunningBroker) -> None:
    write_file(broker.directory / "broker-key.pem", private_key_pem(p256_key()), mode=0o600)


def _another_certificate(broker: RunningBroker) -> None:
    issued = broker.ca.issue(BROKER, dns_names=[BROKER_NAME])
    write_file(broker.directory / "broker.pem", issued.certificate_pem)


def _bytes(name: str, content: bytes) -> Callable[[RunningBroker], None]:
    return lambda broker: (broker.directory / name).write_bytes(content) and None


T23_CASES: dict[str, Callable[[RunningBroker], None]] = {
    "bundle is broken PEM": _bytes("ca.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    "bundle is no PEM": _bytes("ca.pem", bytes(range(256)) * 100),
    "bundle is empty": _bytes("ca.pem", b""),
    "bundle is a line feed": _bytes("ca.pem", b"\n"),
    "bundle is half written": _half_of_the_bundle,
    "bundle has half a second CA": _half_a_second_ca,
    "bundle is a leaf": _a_leaf_as_bundle,
    "bundle is gone": _no_longer_there,
    "key is another one": _another_key,
    "certificate is another one": _another_certificate,
    "key is empty": _bytes("broker-key.pem", b""),
    "certificate is empty": _bytes("broker.pem", b""),
}


def test_t23_files_that_cannot_be_used_leave_the_last_good_ones(own_broker):
    """Each is an alarm and degraded, open calls and new ones go on, and nobody else is let in; then it recovers."""
    broker = own_broker
    good = {name: (broker.directory / name).read_bytes() for name in ("ca.pem", "broker.pem", "broker-key.pem")}
    stranger = CertificateAuthority.create().issue(ORDERS)
    of_stranger = Identity.parse(stranger.certificate_pem, stranger.private_key_pem)
    identity = broker.identity()
    with broker.channel(identity) as channel:
        for name, spoil in T23_CASES.items():
            with reloading(broker, "reload_failed"):
                spoil(broker)
            assert ["tls: the newest files cannot be used"] == broker.readiness()["degraded"], name
            assert 'carnet_reload_failing{what="tls"} 1.0' in broker.get("/metrics")[1], name
            assert [OK, OK, NO_HANDSHAKE] == [
                status_of(channel),
                status_of_new_connection(broker, identity),
                status_of_new_connection(broker, of_stranger),
            ], name
            with reloading(broker):
                for file, content in good.items():
                    write_file(broker.directory / file, content, mode=0o600)
            assert [] == broker.readiness()["degraded"], name
    assert {"the last good one"} == {entry["serving"] for entry in broker.log() if entry["event"] == "reload_failed"}


def test_t23_a_pair_that_is_replaced_one_file_at_a_time_is_taken_up_when_it_fits(own_broker):
    """First the key, then the certificate: in between the old pair serves, and after it the new one."""
    broker = own_broker
    new = broker.ca.issue(BROKER, dns_names=[BROKER_NAME])
    with reloading(broker, "reload_failed"):
        write_file(broker.directory / "broker-key.pem", new.private_key_pem, mode=0o600)
    assert new.leaf.serial_number != served_serial_number(broker)
    assert broker.issue("payments").token
    with reloading(broker):
        write_file(broker.directory / "broker.pem", new.certificate_pem)
    assert new.leaf.serial_number == served_serial_number(broker)
    assert broker.issue("payments").token


def served_serial_number(broker: RunningBroker) -> int:
    """Return the serial number of the certificate that the token listener shows."""
    target = target_of(broker)
    context = openssl_context(target, leaf(broker.ca, datetime.now(UTC)))
    with tls_connection(target.address, context, server_name=BROKER_NAME) as connection:
        found = connection.getpeercert()
    assert found is not None
    return int(str(found["serialNumber"]), 16)


def test_t24_the_brokers_own_certificate_is_renewed_under_load_with_no_failed_call(own_broker):
    """Five times, with calls on an open connection and on a new one for each call; the newest is served at the end."""
    broker = own_broker
    failures: list[object] = []
    calls: Counter[str] = Counter()
    stop = threading.Event()
    identity = broker.identity()

    def on_one_connection() -> None:
        with broker.channel(identity) as channel:
            while not stop.is_set():
                calls["open"] += 1
                failures.extend([status] if (status := status_of(channel)) != OK else [])

    def on_new_connections() -> None:
        while not stop.is_set():
            calls["new"] += 1
            failures.extend([status] if (status := status_of_new_connection(broker, identity)) != OK else [])

    threads = [threading.Thread(target=target) for target in (on_one_connection, on_new_connections)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            issued = broker.ca.issue(BROKER, dns_names=[BROKER_NAME])
            with reloading(broker):
                issued.write(broker.directory, "broker")
            time.sleep(0.7)  # New connections wait half a second for a configuration to be replaced.
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert [] == failures
    assert calls["open"] > 50
    assert calls["new"] > 10
    assert issued.leaf.serial_number == served_serial_number(broker)


# -- T27: handshakes that do not get on --------------------------------------------------------------------------------


def test_t27_handshakes_that_stall_are_ended_while_others_are_served(broker):
    """100 that are silent, stop in the middle or drip: all are ended in time, and nobody waits for them."""
    host, _, port = broker.addresses["tokens"].rpartition(":")
    hello = client_hello(BROKER_NAME, ECDHE_ECDSA_AES_GCM)
    starts = [b"", hello[:1], hello[:5], hello[:6], hello[:50], hello[:-1], hello]
    with ExitStack() as stack:
        stalled = []
        for number in range(100):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            connection.sendall(starts[number % len(starts)])
            stalled.append(connection)
        begun = time.monotonic()
        dripping = threading.Thread(target=drip, args=(stalled[4], hello[50:]))
        dripping.start()
        times = []
        while time.monotonic() - begun < 1.5:
            started = time.monotonic()
            assert broker.issue("payments").token
            times.append(time.monotonic() - started)
        for connection in stalled:
            with suppress(ConnectionError):
                while connection.recv(4096):
                    pass
        took = time.monotonic() - begun
        dripping.join(20)
    assert took < 6, "handshake_timeout is 2 s"
    assert sorted(times)[len(times) // 2] < 0.5
    assert broker.issue("payments").token


def drip(connection: socket.socket, content: bytes) -> None:
    """Send `content` slowly, until the other side has had enough."""
    with suppress(OSError):
        for byte in content:
            connection.sendall(bytes([byte]))
            time.sleep(0.2)


def test_t27_many_connections_at_the_same_moment_do_no_harm(broker):
    """1,000 of strangers, in waves: gRPC must not replace the TLS configuration under one of them (grpc#36693)."""
    host, _, port = broker.addresses["tokens"].rpartition(":")
    for _ in range(10):
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=10)).sendall(b"\x16")
            assert broker.issue("payments").token
    assert broker.process.poll() is None


@pytest.mark.parametrize("said", [b"", PREFACE], ids=["nothing", "no settings"])
def test_t27_a_client_that_says_nothing_after_the_handshake_is_ended_too(broker, said):
    """TLS is done, HTTP/2 never begins: the same time limit."""
    target = target_of(broker)
    context = openssl_context(target, leaf(broker.ca, datetime.now(UTC)))
    with tls_connection(target.address, context, server_name=BROKER_NAME) as connection:
        started = time.monotonic()
        connection.sendall(said)
        with suppress(ssl.SSLError, ConnectionError):
            while connection.recv(4096):
                pass
        assert time.monotonic() - started < 5


def test_t27_a_chain_of_100_certificates_is_refused_quickly(broker):
    """In the handshake, or on the call: the work that a peer can cause is bounded."""
    now = datetime.now(UTC)
    good = leaf(broker.ca, now)
    many = Presented(good.chain_pem + broker.ca.intermediate_pem * 100, good.private_key_pem)
    started = time.monotonic()
    with suppress(ConnectionEndedError):
        assert Expected.ACCEPT is not outcome(target_of(broker), many)
    assert time.monotonic() - started < 2
