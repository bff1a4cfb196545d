"""A verifier that watches like any other, and then goes on listening without taking anything in."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Final, Self

import grpc

from carnet import settings
from carnet.tls import secure_channel
from carnet.v1 import trust_pb2, trust_pb2_grpc
from carnet_broker.demo.shop import AUDIENCE
from carnet_broker.demo.stage import Stage

__all__ = ["INSTANCE", "Laggard"]

INSTANCE: Final = "laggard"
_MAX_STALENESS: Final = 60
"""Seconds; for so long it counts as live without an answer."""


class Laggard:
    """One stream of payments. Once it is counted as live, it answers no more. A context manager."""

    def __init__(self, stage: Stage) -> None:
        """Begin to watch."""
        identity = stage.identity("payments")
        self._channel = secure_channel(
            stage.trust,
            identity=identity,
            ca_pem=stage.ca_file.read_bytes(),
            server_name=settings.broker_name(workload=identity.spiffe_id, environ={}),
        )
        self._requests: queue.Queue[trust_pb2.WatchRequest | None] = queue.Queue()
        hello = trust_pb2.WatchHello(instance_id=INSTANCE, audience=AUDIENCE)
        hello.max_staleness.FromSeconds(_MAX_STALENESS)
        self._requests.put(trust_pb2.WatchRequest(hello=hello))
        self._live = threading.Event()
        self._call = trust_pb2_grpc.TrustServiceStub(self._channel).Watch(self._spoken())
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Say goodbye: nothing has to wait for it any more."""
        self._requests.put(trust_pb2.WatchRequest(goodbye=trust_pb2.WatchGoodbye()))
        self._requests.put(None)
        self._listener.join(5)
        self._channel.close()

    def wait_live(self, seconds: float) -> bool:
        """Say whether the broker counts it as live within so long."""
        return self._live.wait(seconds)

    def _spoken(self) -> Iterator[trust_pb2.WatchRequest]:
        while (request := self._requests.get()) is not None:
            yield request

    def _listen(self) -> None:
        try:
            for number, response in enumerate(self._call, 1):
                if response.live:
                    self._live.set()
                if not self._live.is_set():
                    answer = trust_pb2.WatchAnswer(number=number, position=response.position)
                    self._requests.put(trust_pb2.WatchRequest(answer=answer))
        except grpc.RpcError:
            return  # The broker has ended, or the channel is closed: so the scene ends, too.
