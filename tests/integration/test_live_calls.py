"""Calls and connections that stay, are cancelled or go astray, against a running broker (rows G09 to G12 and G14)."""

from __future__ import annotations

import json
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from carnet import Identity
from carnet.encoding import decode_base64url
from carnet.testing import CertificateAuthority
from carnet.tls import secure_aio_channel
from carnet.v1 import token_pb2, token_pb2_grpc
from carnet_broker.edges.grpc.listeners import ListenerLimits, MutualTls, TlsPems, bind, new_server
from support.attacks import ISSUE_TOKEN, REQUEST, TWO_CALLERS, connected, memory, others_go_on
from support.http2 import (
    END_HEADERS,
    END_STREAM,
    Connection,
    ConnectionEndedError,
    FrameType,
    frame,
    grpc_message,
    request_headers,
    settings,
)
from support.running_broker import (
    BROKER,
    BROKER_NAME,
    ORDERS,
    OUTSIDER,
    RunningBroker,
    reason_of,
    start_broker,
)
from support.vault import VaultPlace, prepare

STRANGER = "spiffe://staging.example/ns/shop/sa/orders"
CALLS_IN_FLIGHT = 256
STREAMS = 128
SLOW = (grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW_REQUEST")
TOO_MANY = (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS")
UNIMPLEMENTED = (grpc.StatusCode.UNIMPLEMENTED, None)
NO_WINDOW = settings({4: 0})
CANCEL = struct.pack(">I", 8)


@pytest.fixture(name="place", scope="module")
def _place(openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultPlace]:
    place = prepare(openbao, tmp_path_factory.mktemp("login"))
    yield place
    place.close()


@pytest.fixture(name="broker", scope="module")
def _broker(place: VaultPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    limits = {"tokens_per_second": 5000, "token_burst": 5000, "read_within": "1500ms"}
    directory = tmp_path_factory.mktemp("broker")
    with start_broker(place, directory, policy=TWO_CALLERS, settings={"limits": limits}) as running:
        yield running


def begin_call(connection: Connection, *data: bytes, ends: bool = False) -> int:
    """Send the headers of a call, and some of its data; return the stream."""
    stream = connection.next_stream()
    connection.send(
        frame(FrameType.HEADERS, request_headers(ISSUE_TOKEN), flags=END_HEADERS, stream=stream),
        *(frame(FrameType.DATA, part, stream=stream) for part in data),
        *([frame(FrameType.DATA, flags=END_STREAM, stream=stream)] if ends else []),
    )
    return stream


def answers_of(connections: list[Connection]) -> Counter[tuple[grpc.StatusCode | None, str | None]]:
    """Count what was answered so far, by status and reason. Calls without an answer are not counted."""
    return Counter(
        (answer.status, answer.reason)
        for connection in connections
        for answer in connection.answers.values()
        if answer.ended
    )


def refused(broker: RunningBroker, spiffe_id: str) -> grpc.RpcError:
    """Ask for a token that must be refused."""
    with pytest.raises(grpc.RpcError) as caught:
        broker.issue("payments", identity=broker.identity(spiffe_id))
    return caught.value


# -- G09, G10: calls and connections that stay -------------------------------------------------------------------------


def test_g09_g10_stalled_calls_of_one_workload_stop_nobody_else(broker):
    """300 that never send their request: 256 wait until `read_within`, the others are refused at once."""
    with others_go_on(broker), ExitStack() as stack:
        connections = [stack.enter_context(connected(broker, OUTSIDER)) for _ in range(3)]
        for connection in connections:
            for _ in range(100):
                begin_call(connection)
        for connection in connections:
            connection.take_in(0.2)
        assert {TOO_MANY: 300 - CALLS_IN_FLIGHT} == answers_of(connections)
        error = refused(broker, OUTSIDER)
        assert "TOO_MANY_REQUESTS" == reason_of(error)
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in rpc_status.from_call(error).details)
        for connection in connections:
            connection.take_in(1)
        assert {TOO_MANY: 300 - CALLS_IN_FLIGHT, SLOW: CALLS_IN_FLIGHT} == answers_of(connections)
    assert "NOT_GRANTED" == reason_of(refused(broker, OUTSIDER))


def test_g09_answers_that_are_never_taken_stop_only_their_own_workload(broker):
    """With a window of nothing a call stays open as long as its connection: 256 of them, and it has no more."""
    with ExitStack() as stack:
        connections = [stack.enter_context(connected(broker, own_settings=NO_WINDOW)) for _ in range(3)]
        with others_go_on(broker):
            for connection in connections:
                for _ in range(100):
                    begin_call(connection, grpc_message(REQUEST), ends=True)
            for connection in connections:
                connection.take_in(0.5)
            assert {TOO_MANY: 300 - CALLS_IN_FLIGHT} == answers_of(connections)
            assert "TOO_MANY_REQUESTS" == reason_of(refused(broker, ORDERS))
            assert broker.key_set(identity=broker.identity(ORDERS)).jwks, "the other listener counts for itself"
    broker.wait_for(lambda: gets_a_token(broker), "the calls of closed connections to be over")


def gets_a_token(broker: RunningBroker) -> bool:
    """Say whether orders gets a token now."""
    try:
        return bool(broker.issue("payments").token)
    except grpc.RpcError:
        return False


def test_g09_a_request_that_drips_is_ended(broker):
    """One byte each tenth of a second: the time is for the whole request, not for each byte."""
    with connected(broker) as connection:
        stream = begin_call(connection)
        started = time.monotonic()
        for byte in grpc_message(b"\x00" * 60):
            connection.take_in(0.1)
            if connection.answers.get(stream) and connection.answers[stream].ended:
                break
            connection.send(frame(FrameType.DATA, bytes([byte]), stream=stream))
        answer = connection.answer(stream, timeout=5)
        assert SLOW == (answer.status, answer.reason)
        assert time.monotonic() - started < 4


def test_g09_headers_that_drip_hold_up_nobody(broker):
    """100 connections on which the headers never end."""
    with others_go_on(broker), ExitStack() as stack:
        connections = [stack.enter_context(connected(broker, OUTSIDER)) for _ in range(100)]
        for connection in connections:
            connection.take_in(0.02)  # From now on nothing has to be acknowledged in the middle of the headers.
        for part in range(5):
            for connection in connections:
                block = request_headers(ISSUE_TOKEN)[part * 10 : part * 10 + 10]
                kind = FrameType.CONTINUATION if part else FrameType.HEADERS
                connection.send(frame(kind, block, stream=1))
            time.sleep(0.1)


def test_g10_a_connection_has_128_streams(broker):
    """The limit is told, and one more is refused (REFUSED_STREAM) with the connection going on."""
    refused_stream = 7
    with connected(broker, OUTSIDER) as connection:
        streams = [begin_call(connection) for _ in range(STREAMS)]
        one_more = begin_call(connection)
        assert refused_stream == connection.answer(one_more).reset
        assert STREAMS == connection.server_settings[3]
        assert SLOW == ((answer := connection.answer(streams[0])).status, answer.reason)


def test_g10_an_idle_connection_costs_little_memory(broker):
    """300 connections of one workload, each after a call; nobody else notices."""
    with others_go_on(broker, growth=100 << 20), ExitStack() as stack:
        before = memory(broker)
        for _ in range(300):
            connection = stack.enter_context(connected(broker, OUTSIDER))
            assert grpc.StatusCode.PERMISSION_DENIED is connection.call(ISSUE_TOKEN, REQUEST).status
        assert (memory(broker) - before) / 300 < 250 << 10


async def test_g10_a_listener_takes_so_many_connections_and_no_more():
    """Those that are there go on; a new one is taken again when one of them has gone."""
    ca = CertificateAuthority.create()
    own, orders = ca.issue(BROKER, dns_names=[BROKER_NAME]), ca.issue(ORDERS)
    identity = Identity.parse(orders.certificate_pem, orders.private_key_pem)
    limits = ListenerLimits(max_connections=3)
    server = new_server(limits)
    pems = TlsPems(own.private_key_pem, own.certificate_pem, ca.root_pem)
    port = bind(server, "127.0.0.1:0", MutualTls(lambda: pems, limits), setting="test")
    await server.start()

    async def status_of(channel: grpc.aio.Channel) -> grpc.StatusCode:
        try:
            await channel.unary_unary("/nothing/Here")(b"", timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code()
        raise AssertionError

    def new_channel() -> grpc.aio.Channel:
        return secure_aio_channel(f"127.0.0.1:{port}", identity=identity, ca_pem=ca.root_pem, server_name=BROKER_NAME)

    channels = [new_channel() for _ in range(3)]
    one_more = new_channel()
    try:
        answered = grpc.StatusCode.UNIMPLEMENTED
        assert [answered] * 3 == [await status_of(channel) for channel in channels]
        assert grpc.StatusCode.UNAVAILABLE is await status_of(one_more)
        assert [answered] * 3 == [await status_of(channel) for channel in channels]
    finally:
        for channel in (*channels, one_more):
            await channel.close()
        await server.stop(None)


# -- G11: deadlines and cancellation -----------------------------------------------------------------------------------


def issue_records(broker: RunningBroker) -> list[str]:
    """Return the jti of each token that is on record as issued."""
    return [record["jti"] for record in broker.audited() if record["kind"] == "issue"]


def token_id(token: str) -> str:
    """Return the jti of a token."""
    return str(json.loads(decode_base64url(token.split(".")[1].encode()))["jti"])


@pytest.mark.parametrize(
    ("timeout", "expected"),
    [(b"0n", grpc.StatusCode.DEADLINE_EXCEEDED), (b"1n", grpc.StatusCode.DEADLINE_EXCEEDED), (b"99999999H", None)],
    ids=["no time", "a nanosecond", "ten thousand years"],
)
def test_g11_the_callers_deadline_is_not_ours(broker, timeout, expected):
    """None at all ends at once; a call that may last for ever and sends nothing ends by `read_within` all the same."""
    with connected(broker) as connection:
        stream = connection.next_stream()
        headers = request_headers(ISSUE_TOKEN, (b"grpc-timeout", timeout))
        connection.send(frame(FrameType.HEADERS, headers, flags=END_HEADERS, stream=stream))
        answer = connection.answer(stream, timeout=5)
    assert (expected or SLOW[0]) is answer.status
    assert broker.issue("payments").token


def test_g11_calls_that_are_cancelled_at_once_leave_an_exact_record(broker):
    """Of 600, most are cancelled right after their request: each token that came is on record once, none twice."""
    before = issue_records(broker)
    tokens = []
    with others_go_on(broker), ExitStack() as stack:
        connections = [stack.enter_context(connected(broker)) for _ in range(3)]
        for number in range(200):
            for connection in connections:
                stream = begin_call(connection, grpc_message(REQUEST), ends=True)
                if number % 10 == 0:
                    answer = connection.answer(stream)
                    assert grpc.StatusCode.OK is answer.status
                    tokens.append(token_pb2.IssueTokenResponse.FromString(answer.message).token)
                else:
                    connection.send(frame(FrameType.RST_STREAM, CANCEL, stream=stream))
        for connection in connections:
            connection.take_in(0.2)
    received = [token_id(token) for token in tokens]
    records = Counter(issue_records(broker)) - Counter(before)
    assert 60 == len(set(received))
    assert {1} == {records[jti] for jti in received}
    assert {1} == set(records.values())


# -- G12: what is not there --------------------------------------------------------------------------------------------

G12_PATHS = [
    b"/\xff\xfe",
    b"/carnet.v1.TokenService/\xc3\x28",
    b"\xff" * 1000,
    b"/carnet.v1.TokenService/Issue\x00Token",
    b"/carnet.v1.TokenService/IssueToken\r\nx: y",
    "/carnet.v1.TokenService/I\N{LATIN SMALL LETTER LONG S}sueToken".encode(),
    b"",
    b"/",
    b"//",
    b"carnet.v1.TokenService/IssueToken",
    b"/carnet.v1.TokenService/IssueToken/",
    b"/carnet.v1.TokenService/issuetoken",
    b"/carnet.v1.TokenService/Nothing",
    b"/carnet.v1.AdminService/Revoke",
    b"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    b"/grpc.channelz.v1.Channelz/GetServers",
    b"/grpc.health.v1.Health/Watch",
    b"/metrics",
    b"*",
]


@pytest.mark.parametrize("spiffe_id", [ORDERS, STRANGER], ids=["workload", "stranger"])
@pytest.mark.parametrize("listener", ["tokens", "trust"])
def test_g12_a_method_that_is_not_there_is_unimplemented_whatever_its_name(broker, listener, spiffe_id):
    """Also one that is no text, which ends a gRPC server of this version if it is left to itself."""
    with others_go_on(broker):
        for path in G12_PATHS:
            with connected(broker, spiffe_id, listener=listener) as connection:
                answer = connection.call(path, REQUEST)
                assert UNIMPLEMENTED == (answer.status, answer.reason), path
                assert answer.headers["grpc-message"] in {"there is no such method", ""}, path
    assert broker.key_set().jwks


def test_g12_a_method_that_was_left_out_is_no_internal_error(broker):
    """Health has a List that is not served: the caller is told so, once it is known, and nobody is alarmed."""
    unserved = b"/grpc.health.v1.Health/List"
    for spiffe_id, expected in (
        (ORDERS, (grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED")),
        (STRANGER, (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")),
    ):
        with connected(broker, spiffe_id) as connection:
            answer = connection.call(unserved, b"")
            assert expected == (answer.status, answer.reason)
    assert not [entry for entry in broker.log() if entry["event"] == "internal_error"]


def test_g12_many_unknown_methods_cost_no_metrics(broker):
    """Their names are the caller's: no label is made of them, and no line of the log."""
    lines = len(broker.log())
    with connected(broker) as connection:
        for number in range(500):
            assert grpc.StatusCode.UNIMPLEMENTED is connection.call(f"/made.up.Service/Method{number}", b"").status
    assert "made.up" not in broker.get("/metrics")[1]
    assert lines == len(broker.log())


def test_g12_a_listener_that_ends_takes_the_process_with_it(place, tmp_path):
    """Without the guard, a path that is no text ends the listener: then the process ends too, for others to restart.

    Once this fails because the broker goes on, gRPC is mended, and the guard can go.
    """
    unguarded = (
        "import contextlib, sys; import carnet_broker.edges.grpc.unknown_methods as guard;"
        "guard.guarded_against_unknown_methods = contextlib.nullcontext;"
        "from carnet_broker.cli import main; sys.argv[0] = 'carnet-broker'; main()"
    )
    with start_broker(place, tmp_path / "broker", command=("-c", unguarded)) as broker:
        with connected(broker) as connection, suppress(ConnectionEndedError, TimeoutError):
            connection.call(b"/\xff", b"", timeout=2)
        assert 1 == broker.process.wait(10)
        ended = [entry for entry in broker.log() if entry["event"] == "part_ended"]
        assert ["tokens"] == [entry["part"] for entry in ended]
        assert "UnicodeDecodeError" in ended[0]["exception"]
        assert "stopped" == broker.log()[-1]["event"]


# -- G14: a broker that leaves -----------------------------------------------------------------------------------------


def test_g14_a_broker_that_drains_records_each_token_that_it_gave_once(place, tmp_path):
    """SIGTERM under load: calls are answered, or end in a way that makes the SDK ask elsewhere; the record is exact.

    gRPC says CANCELLED to calls that reach it while it stops.
    """
    limits = {"tokens_per_second": 5000, "token_burst": 5000}
    with start_broker(place, tmp_path / "broker", settings={"limits": limits}) as broker:
        tokens: list[str] = []
        codes: set[grpc.StatusCode] = set()
        identity = broker.identity()

        def ask() -> None:
            request = token_pb2.IssueTokenRequest(audience="payments")
            with broker.channel(identity) as channel:
                issue = token_pb2_grpc.TokenServiceStub(channel).IssueToken
                while not codes:
                    try:
                        tokens.append(issue(request, timeout=5).token)
                    except grpc.RpcError as error:
                        codes.add(error.code())

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        assert 0 == broker.stop(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        records = Counter(issue_records(broker))
        assert {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED} >= codes
        assert len(tokens) > 50
        assert {1} == {records[token_id(token)] for token in tokens}
        assert {1} == set(records.values())
        assert len(records) - len(tokens) <= len(threads), "no more than were under way"
