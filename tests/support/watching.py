"""A verifier on the wire: `Watch` as a raw gRPC client, so that a test says each message itself."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import grpc

from carnet import Identity
from carnet.revocations import RevocationKind
from carnet.tls import secure_channel
from carnet.v1 import trust_pb2, trust_pb2_grpc
from carnet_broker.edges.store import open_store
from carnet_broker.ports import NewRevocation
from support.running_broker import BROKER_NAME, PAYMENTS, RunningBroker

__all__ = [
    "RawVerifier",
    "hello",
    "revoke_a_token_in_store",
    "revoke_in_store",
    "revoke_many_in_store",
    "watching",
]

_END: Final = object()


def hello(
    instance: str = "one",
    audience: str = "payments",
    *,
    position: trust_pb2.Position | None = None,
    max_staleness: float = 60.0,
    **more: Any,  # noqa: ANN401 - fields of the message
) -> trust_pb2.WatchRequest:
    """Return the first request of a verifier."""
    message = trust_pb2.WatchHello(instance_id=instance, audience=audience, **more)
    if position is not None:
        message.position.CopyFrom(position)
    message.max_staleness.FromMicroseconds(round(max_staleness * 1e6))
    return trust_pb2.WatchRequest(hello=message)


class RawVerifier:
    """One stream. What comes in is kept with the time at which it came."""

    def __init__(self, channel: grpc.Channel, first: trust_pb2.WatchRequest, *, answers: bool = True) -> None:
        """Begin. With `answers` each response is answered as one that was loaded."""
        self.responses: list[tuple[float, trust_pb2.WatchResponse]] = []
        self.position = trust_pb2.Position()
        self.error: grpc.RpcError | None = None
        self._answers = answers
        self._requests: queue.Queue[Any] = queue.Queue()
        self._changed = threading.Condition()
        self._over = False
        self._requests.put(first)
        self._call = trust_pb2_grpc.TrustServiceStub(channel).Watch(iter(self._requests.get, _END))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for response in self._call:
                with self._changed:
                    self.responses.append((time.monotonic(), response))
                    if not response.change.more:
                        self.position = response.position
                    if self._answers:
                        self.answer(len(self.responses))
                    self._changed.notify_all()
        except grpc.RpcError as error:
            self.error = error
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def send(self, request: trust_pb2.WatchRequest) -> None:
        """Send a request."""
        self._requests.put(request)

    def answer(self, number: int, position: trust_pb2.Position | None = None) -> None:
        """Answer a response, as loaded unless another position is given."""
        position = position or self.position
        answer = trust_pb2.WatchAnswer(number=number, position=position if position.epoch else None)
        self.send(trust_pb2.WatchRequest(answer=answer))

    def stop_answering(self) -> None:
        """Listen on, and answer no more."""
        self._answers = False

    def goodbye(self) -> None:
        """Say that the verifier stops."""
        self.send(trust_pb2.WatchRequest(goodbye=trust_pb2.WatchGoodbye()))
        self._requests.put(_END)

    def close(self) -> None:
        """Break the stream off."""
        self._requests.put(_END)
        self._call.cancel()
        self._thread.join(5)

    def wait_for(self, condition: Any, within: float = 10.0) -> trust_pb2.WatchResponse:  # noqa: ANN401 - a predicate
        """Return the first response for which `condition` holds."""
        deadline = time.monotonic() + within
        with self._changed:
            while True:
                for _, response in self.responses:
                    if condition(response):
                        return response
                assert not self._over, f"the stream ended: {self.error}"
                left = deadline - time.monotonic()
                assert left > 0, f"not within {within} s; got {self.responses}"
                self._changed.wait(left)

    def wait_for_end(self, within: float = 10.0) -> grpc.RpcError | None:
        """Return how the stream ended, None where it ended well."""
        self._thread.join(within)
        assert self._over, f"the stream did not end within {within} s"
        return self.error


@contextmanager
def watching(
    broker: RunningBroker,
    first: trust_pb2.WatchRequest | None = None,
    *,
    identity: Identity | None = None,
    answers: bool = True,
) -> Iterator[RawVerifier]:
    """Open a stream of payments, or of `identity`; it is broken off with the block."""
    with secure_channel(
        broker.addresses["trust"],
        identity=identity or broker.identity(PAYMENTS),
        ca_pem=broker.ca.root_pem,
        server_name=BROKER_NAME,
    ) as channel:
        verifier = RawVerifier(channel, first or hello(), answers=answers)
        try:
            yield verifier
        finally:
            verifier.close()


def revoke_a_token_in_store(broker: RunningBroker) -> int:
    """Revoke some token as another replica would."""
    return revoke_in_store(broker, RevocationKind.TOKEN, secrets.token_urlsafe(16), timedelta(minutes=5))


def revoke_in_store(broker: RunningBroker, kind: RevocationKind, value: str, life: timedelta | None) -> int:
    """Revoke as another replica would: in the store, and nobody tells this broker but the store."""
    store = open_store(f"sqlite:///{broker.directory.resolve()}/store.db")
    try:
        page = store.revocations.read(None)
        ends = None if life is None else (page.read_at + life).replace(microsecond=0)
        appended = store.revocations.append([NewRevocation(kind=kind, value=value, expires_at=ends)])
        return appended.entries[-1].version
    finally:
        store.close()


def revoke_many_in_store(broker: RunningBroker, count: int) -> int:
    """Revoke that many tokens as another replica would; return the last version."""
    store = open_store(f"sqlite:///{broker.directory.resolve()}/store.db")
    try:
        ends = (store.revocations.read(None).read_at + timedelta(hours=1)).replace(microsecond=0)
        entries = [
            NewRevocation(kind=RevocationKind.TOKEN, value=secrets.token_urlsafe(16), expires_at=ends)
            for _ in range(count)
        ]
        return store.revocations.append(entries).position.version
    finally:
        store.close()
