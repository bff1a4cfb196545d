"""Who may call what, what of a caller's words reaches logs and records, and how much noise it can make there.

Against a running broker with revocation lists (rows B10 and B17).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
import pytest
from grpc_health.v1 import health_pb2

from carnet.testing import CertificateAuthority
from carnet.testing.ca import write_file
from carnet.v1 import token_pb2, trust_pb2
from certificate_recipe import Presented
from support.attacks import ISSUE_TOKEN, REQUEST, connected
from support.http2 import Answer, connect
from support.mtls_server import Target, openssl_context
from support.running_broker import BROKER_NAME, ORDERS, OUTSIDER, PAYMENTS, RunningBroker, start_broker
from support.vault import prepare
from wrong_certificates import WRONG_CERTIFICATES, Expected

ISSUE_TOKENS = "/carnet.v1.TokenService/IssueTokens"
GET_KEY_SET = "/carnet.v1.TrustService/GetKeySet"
CHECK = "/grpc.health.v1.Health/Check"
LINES_PER_SECOND = 5
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number:UserWarning")


@dataclass(frozen=True)
class World:
    """A broker with revocation lists, and one certificate for each kind of caller."""

    broker: RunningBroker
    callers: dict[str, Presented]

    def call(self, caller: str, listener: str, method: str, request: bytes) -> str:
        """Make a call, and return what became of it: a status, a reason, or that there was no handshake."""
        address = self.broker.addresses[listener]
        context = openssl_context(Target(address, BROKER_NAME, self.broker.ca.root_pem), self.callers[caller])
        try:
            with connect(address, context, server_name=BROKER_NAME) as connection:
                return said(connection.call(method, request))
        except OSError:  # TLS 1.3 tells a client that its certificate is refused when it sends something.
            return "no handshake"


def said(answer: Answer) -> str:
    """Return the reason of an answer, or its status where it has none."""
    assert answer.status is not None
    return answer.reason or answer.status.name


@pytest.fixture(name="world", scope="module")
def _world(openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("broker")
    place = prepare(openbao, directory / "login")
    ca = CertificateAuthority.create()
    issued = {
        name: ca.issue(spiffe_id)
        for name, spiffe_id in {
            "orders": ORDERS,
            "payments": PAYMENTS,
            "outsider": OUTSIDER,
            "staging": "spiffe://staging.example/ns/shop/sa/orders",
            "revoked": ORDERS,
        }.items()
    }
    other = CertificateAuthority.create().issue(ORDERS)
    ca.revoke(issued["revoked"])
    (directory / "broker").mkdir()
    write_file(directory / "broker/list.crl", ca.crl_pem())
    shown = {name: Presented(one.certificate_pem, one.private_key_pem) for name, one in issued.items()}
    shown["nobody"] = Presented(b"", b"")
    shown["other CA"] = Presented(other.certificate_pem, other.private_key_pem)
    settings = {
        "tls": {"crl_files": ["list.crl"]},
        "limits": {"tokens_per_second": 5000, "token_burst": 5000},
        "log": {"lines_per_second": LINES_PER_SECOND},
    }
    with start_broker(place, directory / "broker", ca=ca, settings=settings) as broker:
        yield World(broker, shown)
    place.close()


# -- B17: who may call what --------------------------------------------------------------------------------------------

BATCH = token_pb2.IssueTokensRequest(requests=[token_pb2.IssueTokenRequest(audience="payments")]).SerializeToString()
METHODS = {
    "IssueToken": ("tokens", ISSUE_TOKEN, REQUEST),
    "IssueTokens": ("tokens", ISSUE_TOKENS, BATCH),
    "GetKeySet": ("trust", GET_KEY_SET, b""),
    "GetKeySet, a key missed": (
        "trust",
        GET_KEY_SET,
        trust_pb2.GetKeySetRequest(missing_key_id="A" * 43).SerializeToString(),
    ),
    "Check at tokens": ("tokens", CHECK, health_pb2.HealthCheckRequest().SerializeToString()),
    "Check at trust": ("trust", CHECK, health_pb2.HealthCheckRequest().SerializeToString()),
    "IssueToken at trust": ("trust", ISSUE_TOKEN, REQUEST),
    "GetKeySet at tokens": ("tokens", GET_KEY_SET, b""),
}
# A batch is answered, and each request in it has its own result.
KNOWN = {
    "IssueToken": "OK",
    "IssueTokens": "OK",
    "GetKeySet": "OK",
    "GetKeySet, a key missed": "OK",
    "Check at tokens": "OK",
    "Check at trust": "OK",
    "IssueToken at trust": "UNIMPLEMENTED",
    "GetKeySet at tokens": "UNIMPLEMENTED",
}
UNKNOWN = {method: "UNAUTHENTICATED" if said == "OK" else said for method, said in KNOWN.items()}
NOBODY = dict.fromkeys(KNOWN, "no handshake")
MATRIX = {
    "orders": KNOWN,
    "payments": KNOWN | {"IssueToken": "NOT_GRANTED"},
    "outsider": KNOWN | {"IssueToken": "NOT_GRANTED"},
    "staging": UNKNOWN,
    "revoked": UNKNOWN,
    "other CA": NOBODY,
    "nobody": NOBODY,
}


@pytest.mark.parametrize("caller", MATRIX)
def test_b17_each_caller_gets_exactly_what_the_matrix_says(world, caller):
    """Each method, on each listener, for each kind of identity: the documented cells and no other one succeed."""
    assert MATRIX[caller] == {method: world.call(caller, *how) for method, how in METHODS.items()}


@pytest.mark.parametrize(("caller", "kind"), [("orders", "issued"), ("outsider", "refused"), ("payments", "refused")])
def test_b17_a_batch_gives_no_more_than_single_calls(world, caller, kind):
    """The answer is OK; what is in it is what the caller would have got alone."""
    address = world.broker.addresses["tokens"]
    context = openssl_context(Target(address, BROKER_NAME, world.broker.ca.root_pem), world.callers[caller])
    with connect(address, context, server_name=BROKER_NAME) as connection:
        answer = token_pb2.IssueTokensResponse.FromString(connection.call(ISSUE_TOKENS, BATCH).message)
    assert [kind] == [result.WhichOneof("result") for result in answer.results]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/oauth2/jwks"])
def test_b17_the_plain_ports_pages_are_not_on_the_listeners(world, path):
    """They need no certificate where they are; here they are unknown methods of callers who have one."""
    for listener in ("tokens", "trust"):
        assert "UNIMPLEMENTED" == world.call("orders", listener, path, b"")
        assert "no handshake" == world.call("nobody", listener, path, b"")
    assert 200 == world.broker.get(path)[0]


# -- B10: a caller's words ---------------------------------------------------------------------------------------------

NASTY = {
    "CR LF": 'x\r\n{"kind":"issue","jti":"forged"}\r\n',
    "line feed": 'x\n{"event":"forged"}\n',
    "U+2028, U+2029, U+0085": "x\u2028\u2029\u0085y",
    "ANSI escape": "x\x1b[2J\x1b[31mred\x07",
    "C1 control": "x\x9b31m",
    "NUL": "x\x00y",
    "quotes": '","event":"forged","x":"',
    "backslashes": "\\\\n\\u000a",
    "right to left": "x\u202egnorw",
    "long": "x" * 30_000,
    "braces and percents": "{0} {event} %s %(message)s ${PATH}",
}


def lines_of(broker: RunningBroker) -> list[bytes]:
    """Return each line of the log and of the audit record."""
    files = [broker.directory / "log", *sorted(broker.audit_directory.glob("*"))]
    return [line for file in files for line in file.read_bytes().split(b"\n") if line]


def assert_one_record_for_each_line(broker: RunningBroker) -> None:
    """Nothing of what a caller sent ends a line, or steers a terminal: each is one JSON object of printable ASCII."""
    for line in lines_of(broker):
        assert re.fullmatch(rb"[\x20-\x7e]+", line), line[:200]
        record = json.loads(line)
        assert {"forged"}.isdisjoint(str(value) for value in record.values()), line[:200]
        assert len(line) < 256 * 1024


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_b10_no_field_of_a_request_injects_anything(world, text):
    """As audience, as scope, as the key that is missed; refused, or answered, with one line at most for each call."""
    before = len(lines_of(world.broker))
    asked = [
        ("tokens", ISSUE_TOKEN, token_pb2.IssueTokenRequest(audience=text)),
        ("tokens", ISSUE_TOKEN, token_pb2.IssueTokenRequest(audience="payments", scopes=[text])),
        ("trust", GET_KEY_SET, trust_pb2.GetKeySetRequest(missing_key_id=text)),
    ]
    for listener, method, request in asked:
        assert world.call("orders", listener, method, request.SerializeToString()) in {
            "INVALID_REQUEST",
            "NOT_GRANTED",
            "SCOPE_NOT_GRANTED",
            "OK",
        }
    time.sleep(0.15)  # Refusals are written within a tenth of a second.
    assert len(lines_of(world.broker)) - before <= 2 * len(asked)
    assert_one_record_for_each_line(world.broker)


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_b10_no_metadata_injects_anything(world, text):
    """The user agent, an authorization, a key of the caller's own: the broker writes none of them down."""
    value = text.encode()[:8000]
    for name in (b"user-agent", b"authorization", b"x-request-id", b"grpc-trace-bin"):
        with connected(world.broker) as connection, suppress(ConnectionError):
            connection.call(ISSUE_TOKEN, REQUEST, (name, value))
    assert_one_record_for_each_line(world.broker)


def test_b10_b11_a_token_in_metadata_that_is_no_text_is_not_logged(world):
    """gRPC would write the whole value into the log."""
    token = world.broker.issue("payments").token.encode()
    with connected(world.broker) as connection:
        answer = connection.call(ISSUE_TOKEN, REQUEST, (b"authorization", b"Bearer " + token + b"\xff"))
    assert grpc.StatusCode.OK is answer.status
    assert token[-60:] not in b"\n".join(lines_of(world.broker))


def test_b10_no_name_in_a_refused_certificate_injects_anything(world):
    """NUL, CR LF, other alphabets, 2,000 bytes: the log quotes the name, cut and escaped."""
    broker = world.broker
    target = Target(broker.addresses["tokens"], BROKER_NAME, broker.ca.root_pem)
    kinds = [
        kind
        for kind in WRONG_CERTIFICATES.values()
        if kind.expected is Expected.UNAUTHENTICATED and kind.row in {"T05", "T06", "T07", "T09", "T10"}
    ]
    kinds = [
        kind for kind in kinds if "-byte-" not in kind.name or kind.name[-2:] in {"00", "0a", "0d", "1b", "22", "9b"}
    ]

    def refused(kind) -> str:
        context = openssl_context(target, kind.build(broker.ca, datetime.now(UTC)))
        with connect(target.address, context, server_name=BROKER_NAME) as connection:
            return said(connection.call(ISSUE_TOKEN, REQUEST))

    with ThreadPoolExecutor(4) as pool:
        assert {"UNAUTHENTICATED"} == set(pool.map(refused, kinds))
    assert_one_record_for_each_line(broker)


# -- noise -------------------------------------------------------------------------------------------------------------


def flood(broker: RunningBroker, spiffe_id: str, count: int) -> None:
    """Make calls that are refused, as fast as one connection takes them."""
    with connected(broker, spiffe_id) as connection:
        for _ in range(count):
            assert connection.call(ISSUE_TOKEN, REQUEST).status is not grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("spiffe_id", "is_one"),
    [
        ("spiffe://staging.example/ns/noise/sa/loud", lambda entry: entry["event"] == "unauthenticated"),
        (OUTSIDER, lambda entry: entry["event"] == "refused" and entry["subject"] == OUTSIDER),
    ],
    ids=["strangers", "a workload"],
)
def test_b10_noise_fills_a_bounded_part_of_the_log(world, spiffe_id: str, is_one: Callable[[dict[str, str]], bool]):
    """1,000 refused calls are some tens of lines, and the rest is counted: in a line each second and in a metric."""
    broker = world.broker

    def left_out() -> int:
        return sum(int(entry["count"]) for entry in broker.log() if entry["event"] == "lines_left_out")

    def logged() -> int:
        return sum(map(is_one, broker.log()))

    time.sleep(1.5)  # Until the noise of before is told of.
    lines, omitted, started = logged(), left_out(), time.monotonic()
    flood(broker, spiffe_id, 1000)
    took = time.monotonic() - started
    broker.wait_for(lambda: logged() - lines + left_out() - omitted >= 1000, "all calls to be told of")
    assert 1000 == logged() - lines + left_out() - omitted
    assert logged() - lines <= 4 * LINES_PER_SECOND + LINES_PER_SECOND * (took + 1)
    assert left_out() == metric(broker, "carnet_log_lines_left_out_total")


def metric(broker: RunningBroker, name: str) -> int:
    """Return the value of a metric without labels."""
    found = re.search(rf"^{name} (\S+)$", broker.get("/metrics")[1], re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def test_b10_noise_of_strangers_does_not_hide_what_a_workload_does(world):
    """Each has a part of the log of its own: a refusal of payments is there, in the middle of it."""
    broker = world.broker
    with ThreadPoolExecutor(1) as pool:
        noise = pool.submit(flood, broker, "spiffe://staging.example/ns/noise/sa/loud", 300)
        assert "NOT_GRANTED" == world.call("payments", "tokens", ISSUE_TOKEN, REQUEST)
        noise.result()
    assert [entry for entry in broker.log() if entry["event"] == "refused" and entry["subject"] == PAYMENTS]
