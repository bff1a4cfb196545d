"""Attacking a running broker over HTTP/2, while honest callers go on and the process is watched."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc

from carnet.v1 import token_pb2, token_pb2_grpc
from certificate_recipe import Presented
from support.http2 import (
    Answer,
    Connection,
    ConnectionEndedError,
    connect,
    data_frames,
    header_frames,
    request_headers,
    settings,
)
from support.mtls_server import Target, openssl_context
from support.running_broker import BROKER_NAME, ORDERS, POLICY, RunningBroker

__all__ = [
    "HONEST",
    "ISSUE_TOKEN",
    "REQUEST",
    "TWO_CALLERS",
    "Others",
    "call_with",
    "connected",
    "memory",
    "others_go_on",
    "outcome",
    "processor_time",
]

HONEST: Final = "spiffe://prod.example/ns/shop/sa/honest"
"""A workload that is no attacker, and may ask for tokens like ``orders``."""
TWO_CALLERS: Final = POLICY + f"  - {{ workload: {HONEST}, audience: payments, scopes: [charge] }}\n"
ISSUE_TOKEN: Final = "/carnet.v1.TokenService/IssueToken"
REQUEST: Final = token_pb2.IssueTokenRequest(audience="payments").SerializeToString()


@contextmanager
def connected(
    broker: RunningBroker, spiffe_id: str = ORDERS, *, listener: str = "tokens", own_settings: bytes = settings({})
) -> Iterator[Connection]:
    """Open an HTTP/2 connection by hand, as a workload."""
    identity = broker.identity(spiffe_id)
    shown = Presented(identity.certificate_chain_pem, identity.private_key_pem)
    address = broker.addresses[listener]
    context = openssl_context(Target(address, BROKER_NAME, broker.ca.root_pem), shown)
    with connect(address, context, server_name=BROKER_NAME, own_settings=own_settings) as connection:
        yield connection


def memory(broker: RunningBroker) -> int:
    """Return the resident memory of the process, in bytes."""
    text = Path(f"/proc/{broker.process.pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


def processor_time(broker: RunningBroker) -> float:
    """Return the seconds of processor time that the process has had."""
    fields = Path(f"/proc/{broker.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Others:
    """What an honest caller saw during an attack, and the memory of the broker."""

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


@contextmanager
def others_go_on(broker: RunningBroker, *, growth: int = 50 << 20) -> Iterator[Others]:
    """Let an honest workload ask for tokens during the block: all are given, and soon.

    The memory of the broker grows by at most `growth` bytes.
    """
    seen = Others()
    stop = threading.Event()
    request = token_pb2.IssueTokenRequest(audience="payments")

    def ask() -> None:
        with broker.channel(broker.identity(HONEST)) as channel:
            issue = token_pb2_grpc.TokenServiceStub(channel).IssueToken
            while True:
                seen.memory.append(memory(broker))
                started = time.monotonic()
                try:
                    assert issue(request, timeout=5).token
                except grpc.RpcError as error:
                    seen.failures.append(f"{error.code()} {error.details()}")
                seen.seconds.append(time.monotonic() - started)
                if stop.wait(0.005):
                    break

    before = memory(broker)
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join(20)
    assert broker.process.poll() is None, "the broker has ended"
    assert [] == seen.failures
    assert sorted(seen.seconds)[len(seen.seconds) // 2] < 0.5
    assert max(seen.seconds) < 4
    assert max(seen.memory) - before < growth


def call_with(broker: RunningBroker, body: bytes, *, headers: bytes | None = None, timeout: float = 8) -> Answer | None:
    """Make a call of these headers and this body on a new connection; None where the server ends the connection."""
    block = request_headers(ISSUE_TOKEN) if headers is None else headers
    with connected(broker) as connection:
        stream = connection.next_stream()
        try:
            connection.send(*header_frames(block, stream))
            connection.send(*data_frames(body, stream))
            return connection.answer(stream, timeout=timeout)
        except ConnectionEndedError:
            return None


def outcome(answer: Answer | None) -> tuple[grpc.StatusCode | None, str | None]:
    """Return the status, and the reason if it was the broker's own code that answered."""
    return (None, None) if answer is None else (answer.status, answer.reason)
