"""Certificates and connections that must be refused, and their accepted twins, on real TLS (rows T01 to T20).

Tried on the smallest server with our rules, where a test can look inside, and on both listeners of a whole broker.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from carnet.testing import CertificateAuthority, IssuedCertificate
from carnet.v1 import token_pb2
from carnet_broker.core.workload import IdentityReason, TrustBundle
from certificate_recipe import Presented, leaf
from support.http2 import grpc_status_of_call, tls_connection
from support.mtls_server import MtlsServer, Target, grpc_channel, mtls_server, openssl_context, outcome
from support.running_broker import BROKER_NAME, ORDERS, RunningBroker, start_broker
from support.vault import prepare
from wrong_certificates import WRONG_CERTIFICATES, Client, Expected, WrongCertificate

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED.value[0]
KINDS = list(WRONG_CERTIFICATES.values())
FEW = [kind for kind in KINDS if "-byte-" not in kind.name]
ids = {"ids": lambda kind: kind.name}
# A server that makes warnings errors would refuse as well; this one must not lean on that.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number:UserWarning")


@pytest.fixture(name="ca", scope="module")
def _ca() -> CertificateAuthority:
    return CertificateAuthority.create()


@pytest.fixture(name="server", scope="module")
def _server(ca: CertificateAuthority) -> Iterator[MtlsServer]:
    with mtls_server(ca) as server:
        yield server


@pytest.fixture(name="broker", scope="module")
def _broker(ca: CertificateAuthority, openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    directory = tmp_path_factory.mktemp("broker")
    place = prepare(openbao, directory / "login")
    limits = {"tokens_per_second": 1000, "token_burst": 1000, "key_sets_per_second": 1000}
    with start_broker(place, directory / "broker", ca=ca, settings={"limits": limits}) as running:
        yield running
    place.close()


def target_of(broker: RunningBroker, listener: str) -> Target:
    """Return a listener of a broker, with a method of it that the good twin may call."""
    method, request = {
        "tokens": ("TokenService/IssueToken", token_pb2.IssueTokenRequest(audience="payments").SerializeToString()),
        "trust": ("TrustService/GetKeySet", b""),
    }[listener]
    return Target(broker.addresses[listener], BROKER_NAME, broker.ca.root_pem, f"/carnet.v1.{method}", request)


@pytest.fixture(name="target", params=["server", "tokens", "trust"])
def _target(request: pytest.FixtureRequest) -> Target:
    """Each of the servers in turn."""
    if request.param == "server":
        server: MtlsServer = request.getfixturevalue("server")
        return server.target
    return target_of(request.getfixturevalue("broker"), request.param)


def now() -> datetime:
    """The time that TLS goes by."""
    return datetime.now(UTC)


# -- certificates: T01 to T15 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, **ids)
def test_each_wrong_kind_is_refused_by_our_rules_on_grpc(
    kind: WrongCertificate, ca: CertificateAuthority, server: MtlsServer
):
    """In the handshake or on the call, as the table says; and nothing but that is told to the caller."""
    started = time.perf_counter()
    assert kind.expected is outcome(server.target, kind.build(ca, now()), kind.client)
    if kind.row == "T12":
        assert time.perf_counter() - started < 2


@pytest.mark.parametrize("kind", KINDS, **ids)
def test_each_wrong_kind_is_refused_by_the_token_listener(
    kind: WrongCertificate, ca: CertificateAuthority, broker: RunningBroker
):
    """The same on a whole broker. An accepted twin with another name is known, and granted nothing."""
    assert kind.expected is outcome(target_of(broker, "tokens"), kind.build(ca, now()), kind.client)


@pytest.mark.parametrize("kind", FEW, **ids)
def test_each_wrong_kind_is_refused_by_the_trust_listener(
    kind: WrongCertificate, ca: CertificateAuthority, broker: RunningBroker
):
    """The same there."""
    assert kind.expected is outcome(target_of(broker, "trust"), kind.build(ca, now()), kind.client)


def test_after_all_that_the_good_twin_is_still_served(target: Target, ca: CertificateAuthority):
    """Nothing of it was a crash."""
    assert Expected.ACCEPT is outcome(target, leaf(ca, now()))


def test_both_kinds_of_client_come_to_the_same_result(target: Target, ca: CertificateAuthority):
    """What is tried with OpenSSL, because gRPC's client cannot, would be accepted if it were good."""
    for name in ("T01-good", "T03-no-usage", "T01-other-authority"):
        kind = WRONG_CERTIFICATES[name]
        for client in Client:
            assert kind.expected is outcome(target, kind.build(ca, now()), client)


def test_the_caller_is_told_nothing_but_that_it_is_refused(target: Target, ca: CertificateAuthority):
    """One constant text for all reasons: no oracle."""
    told = set()
    for name in ("T03-no-usage", "T04-ca", "T06-two-ids", "T08-other", "T14-rsa-1024", "T15-serial-zero"):
        with (
            grpc_channel(target, WRONG_CERTIFICATES[name].build(ca, now())) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            channel.unary_unary(target.method)(target.request, timeout=10)
        told.add((caught.value.code(), caught.value.details()))

    assert 1 == len(told)
    assert grpc.StatusCode.UNAUTHENTICATED is told.pop()[0]


def test_grpc_gives_the_leaf_and_the_rest_of_the_chain_apart(server: MtlsServer, ca: CertificateAuthority):
    """What the broker relies on: one leaf, and what was sent after it as one text."""
    issued = ca.issue(ORDERS)
    outcome(server.target, Presented(issued.certificate_pem + ca.root_pem, issued.private_key_pem))
    (own,), (sent,) = (server.contexts[-1][name] for name in ("x509_pem_cert", "x509_pem_cert_chain"))

    assert issued.certificate_pem == own + ca.intermediate_pem
    assert ca.intermediate_pem + ca.root_pem == sent


def test_grpc_leaves_the_chain_out_where_nothing_was_sent_after_the_leaf(ca: CertificateAuthority):
    """A leaf by the trusted authority itself."""
    with mtls_server(ca) as server:
        server.client_ca_pem = ca.intermediate_pem
        server.bundle = TrustBundle.parse(ca.intermediate_pem, [], ["prod.example"])
        issued = ca.issue(ORDERS)
        own = Presented(issued.certificate_pem.removesuffix(ca.intermediate_pem), issued.private_key_pem)

        assert Expected.ACCEPT is outcome(server.target, own)
        assert "x509_pem_cert_chain" not in server.contexts[-1]


# -- connections that outlive what they were made with: T16, T17 -------------------------------------------------------


def status_of(channel: grpc.Channel, target: Target) -> grpc.StatusCode:
    """Make one more call on an open channel."""
    try:
        channel.unary_unary(target.method)(target.request, timeout=10)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def test_t17_a_connection_that_is_kept_past_the_end_of_its_certificate_is_refused(
    target: Target, ca: CertificateAuthority
):
    """On the next call; and the certificate opens no new connection."""
    ends = now().replace(microsecond=0) + timedelta(seconds=3)
    shown = leaf(ca, now(), not_after=ends)
    with grpc_channel(target, shown) as channel:
        before = status_of(channel, target)
        assert now() < ends, "the machine is too slow for a certificate of three seconds"
        time.sleep((ends - now()).total_seconds())
        after = status_of(channel, target)

    # The token listener knows the caller, and issues nothing on a certificate that is about to end.
    assert before in (grpc.StatusCode.OK, grpc.StatusCode.FAILED_PRECONDITION)
    assert grpc.StatusCode.UNAUTHENTICATED is after
    assert Expected.HANDSHAKE is outcome(target, shown)


def test_t16_a_certificate_that_is_revoked_is_refused_on_its_open_connection(ca: CertificateAuthority):
    """On the next call, and on new ones. The same serial number by another authority stays good."""
    authority, other = ca.with_new_intermediate(), ca.with_new_intermediate()
    revoked, neighbour = leaf(authority, now(), serial=4711), leaf(other, now(), serial=4711)
    with mtls_server(ca) as server, grpc_channel(server.target, revoked) as channel:
        server.bundle = TrustBundle.parse(ca.root_pem, [authority.crl_pem(), other.crl_pem()], ["prod.example"])
        assert grpc.StatusCode.OK is status_of(channel, server.target)

        certificate = x509.load_pem_x509_certificate(revoked.chain_pem)
        authority.revoke(IssuedCertificate(revoked.chain_pem, revoked.private_key_pem, certificate))
        server.bundle = TrustBundle.parse(ca.root_pem, [authority.crl_pem(), other.crl_pem()], ["prod.example"])

        assert grpc.StatusCode.UNAUTHENTICATED is status_of(channel, server.target)
        assert Expected.UNAUTHENTICATED is outcome(server.target, revoked)
        assert [IdentityReason.REVOKED] * 2 == server.reasons
        assert Expected.ACCEPT is outcome(server.target, neighbour)


def test_an_authority_that_is_taken_out_of_the_bundle_is_refused_on_open_connections(ca: CertificateAuthority):
    """T18, without any resumption: the connection was made while it was trusted."""
    with mtls_server(ca) as server, grpc_channel(server.target, leaf(ca, now())) as channel:
        assert grpc.StatusCode.OK is status_of(channel, server.target)
        server.bundle = TrustBundle.parse(CertificateAuthority.create().root_pem, [], ["prod.example"])

        assert grpc.StatusCode.UNAUTHENTICATED is status_of(channel, server.target)
        assert [IdentityReason.UNTRUSTED] == server.reasons


# -- TLS sessions and versions: T18 to T20 -----------------------------------------------------------------------------


def call_with_session_of(
    target: Target, shown: Presented, *, wait: timedelta, meanwhile: Presented | None = None
) -> tuple[bool, int]:
    """Connect, keep the session, offer it to a second connection after a while, and make a call on that.

    `meanwhile` connects again and again while we wait, so that the listener is never quiet. Return whether the server
    took the session, and the status of the call.
    """
    context = openssl_context(target, shown)
    with tls_connection(target.address, context, server_name=target.server_name) as connection:
        grpc_status_of_call(connection, target.method, target.request)  # TLS 1.3 sends tickets after the handshake.
        session = connection.session
    until = time.monotonic() + wait.total_seconds()
    while (left := until - time.monotonic()) > 0:
        if meanwhile is not None:
            other = openssl_context(target, meanwhile)
            with tls_connection(target.address, other, server_name=target.server_name):
                pass
        time.sleep(min(left, 0.1 if meanwhile is not None else left))
    with tls_connection(target.address, context, server_name=target.server_name, session=session) as connection:
        status = grpc_status_of_call(connection, target.method, target.request)
        return bool(connection.session_reused), status


def test_t18_no_session_is_resumed_when_the_listener_was_quiet_for_half_a_second(
    target: Target, ca: CertificateAuthority
):
    """The session is offered, and a full handshake is made all the same; nobody is punished for offering."""
    assert (False, 0) == call_with_session_of(target, leaf(ca, now()), wait=timedelta(seconds=0.7))


@pytest.mark.parametrize("listener", ["tokens", "trust"])
def test_t18_the_broker_resumes_no_session_of_a_burst_either(broker: RunningBroker, ca: CertificateAuthority, listener):
    """Thirty handshakes without a pause, each with a session of a moment ago; test_tls_storm.py has the figures.

    A handshake that comes before the keeper of the one before it could resume; three are let pass.
    """
    target, shown = target_of(broker, listener), leaf(ca, now())
    taken = [call_with_session_of(target, shown, wait=timedelta(0)) for _ in range(30)]
    assert [0] * 30 == [status for _, status in taken]
    assert sum(resumed for resumed, _ in taken) <= 3


def test_t18_a_session_of_a_burst_is_judged_by_the_certificate_that_it_brings_back(
    server: MtlsServer, ca: CertificateAuthority
):
    """A good one is served; one that has ended since is refused, although TLS asks for no certificate again.

    On a listener without keepers, where sessions of a burst are resumed.
    """
    target = server.target
    assert (True, 0) == call_with_session_of(target, leaf(ca, now()), wait=timedelta(0))
    ends = now().replace(microsecond=0) + timedelta(seconds=3)
    ended = call_with_session_of(target, leaf(ca, now(), not_after=ends), wait=ends - now(), meanwhile=leaf(ca, now()))
    assert (True, UNAUTHENTICATED) == ended


def test_t18_the_server_sees_the_whole_chain_of_a_resumed_session(ca: CertificateAuthority):
    """Or no such call could be judged. The first handshake is the twin."""
    with mtls_server(ca) as server:
        assert (True, 0) == call_with_session_of(server.target, leaf(ca, now()), wait=timedelta(0))
        first, resumed = server.contexts
    for name in ("x509_pem_cert", "x509_pem_cert_chain"):
        assert first[name] == resumed[name]
    assert [b"false", b"true"] == [b"".join(peer["ssl_session_reused"]) for peer in (first, resumed)]


def test_t18_a_session_brings_back_no_certificate_whose_authority_is_gone(ca: CertificateAuthority):
    """The session was made while the authority was trusted; the connection that offers it is refused."""
    with mtls_server(ca) as server:
        target, context = server.target, openssl_context(server.target, leaf(ca, now()))
        with tls_connection(target.address, context, server_name=target.server_name) as connection:
            assert 0 == grpc_status_of_call(connection, target.method)
            session = connection.session
        server.client_ca_pem = CertificateAuthority.create().root_pem

        with (
            pytest.raises((ssl.SSLError, ConnectionError)),
            tls_connection(target.address, context, server_name=target.server_name, session=session) as connection,
        ):
            grpc_status_of_call(connection, target.method)


def test_t19_no_early_data_is_offered(target: Target, ca: CertificateAuthority, tmp_path: Path):
    """0-RTT data could be replayed. What tickets there are allow none of it, and a client that tries sends none."""
    shown = leaf(ca, now())
    files = {"ca": target.ca_pem, "own": shown.chain_pem, "key": shown.private_key_pem, "early": b"PRI * HTTP/2.0"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def connect(*more: str) -> str:
        """Connect with OpenSSL's client, wait half a second for tickets, and end; return what it tells."""
        command = [
            *("openssl", "s_client", "-connect", target.address, "-servername", target.server_name, "-tls1_3"),
            *("-CAfile", "ca", "-cert", "own", "-cert_chain", "own", "-key", "key", "-alpn", "h2"),
            *more,
        ]
        with subprocess.Popen(
            command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            time.sleep(0.5)
            return process.communicate(b"Q\n", timeout=10)[0].decode("latin-1")

    first = connect("-sess_out", "session")
    assert "Verify return code: 0 (ok)" in first
    assert {"0"} >= set(re.findall(r"Max Early Data: ([0-9]+)", first))
    if (tmp_path / "session").exists():
        assert "Early data was not sent" in connect("-sess_in", "session", "-early_data", "early")


def tls_only(target: Target, shown: Presented, version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return a client that speaks one version."""
    context = openssl_context(target, shown)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = version
    context.minimum_version = version
    return context


def test_t20_tls_1_2_is_refused_on_each_call_and_1_3_is_accepted(target: Target, ca: CertificateAuthority):
    """A gRPC server in Python cannot be told to speak 1.3 only, so the call is where it ends."""
    shown = leaf(ca, now())
    for version, good in ((ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)):
        context = tls_only(target, shown, version)
        with tls_connection(target.address, context, server_name=target.server_name) as connection:
            status = grpc_status_of_call(connection, target.method, target.request)
            assert connection.version() == ("TLSv1.3" if good else "TLSv1.2")
        assert good == (status != UNAUTHENTICATED)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_t20_older_tls_is_refused_in_the_handshake(version: ssl.TLSVersion, target: Target, ca: CertificateAuthority):
    """Never a call. The client could: with a server of its own kind it does."""
    context = tls_only(target, leaf(ca, now()), version)
    with (
        pytest.raises((ssl.SSLError, ConnectionError)),
        tls_connection(target.address, context, server_name=target.server_name),
    ):
        pass

    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.set_ciphers("DEFAULT:@SECLEVEL=0")
    own.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    issued = ca.issue(ORDERS, dns_names=[target.server_name])
    with tempfile.NamedTemporaryFile() as file:
        file.write(issued.private_key_pem + issued.certificate_pem)
        file.flush()
        own.load_cert_chain(file.name)
    assert version.name.replace("_", ".") == spoken(context, own, target.server_name)


def spoken(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> str | None:
    """Return the TLS version that the two agree on, in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(10):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0].version()


def test_t20_plain_text_is_no_way_in(target: Target):
    """T22 with it: HTTP/2 without TLS gets nothing."""
    with grpc.insecure_channel(target.address) as channel:
        assert grpc.StatusCode.UNAVAILABLE is status_of(channel, target)
