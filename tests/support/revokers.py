"""Revoking without pause, through one replica each, whatever happens to it; and verifiers that note what they load.

What was acknowledged is kept: it must be in the store afterwards, and refused by every verifier. A call that failed may
have revoked or not, so it is made again until it is acknowledged, as a caller would.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import grpc

from carnet import Verifier
from carnet.errors import CarnetError, InvalidTokenError
from carnet.tls import secure_channel
from carnet.trust_messages import Response
from carnet.trust_state import Outcome
from carnet.v1 import token_pb2, token_pb2_grpc
from carnet.verify import parse_unverified
from support.fleet import Fleet
from support.running_broker import BROKER_NAME, ISSUER, PAYMENTS

__all__ = ["Acknowledged", "Revokers", "Witness", "revokers", "witnesses"]

_LIFE: Final = 3600
_AGAIN: Final = 0.05
_RECONNECTS: Final = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200))


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A revocation that a replica said is durable."""

    token: str
    token_id: str
    version: int
    replica: int
    at: float
    """When the call returned, in monotonic seconds."""


class Revokers:
    """One thread for each replica. Made by `revokers`."""

    def __init__(self, fleet: Fleet, *, per_second: float) -> None:
        self.identity = fleet.identity()
        self.failed: Counter[str] = Counter()
        """Calls that were not acknowledged, by method and code."""
        self._fleet = fleet
        self._pause = 1 / per_second / len(fleet)
        self._acknowledged: list[Acknowledged] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(len(fleet))]

    def acknowledged(self, since: int = 0) -> list[Acknowledged]:
        """Return those that were acknowledged so far, but for the first `since`."""
        return self._acknowledged[since:]

    def wait_for_each(self, since: int, within: float = 20.0) -> None:
        """Wait until every replica has acknowledged one more than the first `since`."""
        deadline = time.monotonic() + within
        while len({one.replica for one in self.acknowledged(since)}) < len(self._fleet):
            assert time.monotonic() < deadline, f"not every replica revokes within {within} s: {dict(self.failed)}"
            time.sleep(0.02)

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, when the calls under way are over."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, number: int) -> None:
        with secure_channel(
            self._fleet.targets("tokens")[number],
            identity=self.identity,
            ca_pem=self._fleet.ca.root_pem,
            server_name=BROKER_NAME,
            options=_RECONNECTS,
        ) as channel:
            stub = token_pb2_grpc.TokenServiceStub(channel)
            wanted = token_pb2.IssueTokenRequest(audience="payments")
            wanted.ttl.FromSeconds(_LIFE)
            while (issued := self._until_answered(stub.IssueToken, wanted)) is not None:
                token = str(issued.token)
                revoked = self._until_answered(stub.RevokeToken, token_pb2.RevokeTokenRequest(token=token))
                if revoked is None:
                    return
                token_id = str(parse_unverified(token).unverified_payload["jti"])
                version = int(revoked.revocation_version)
                self._acknowledged.append(Acknowledged(token, token_id, version, number, time.monotonic()))
                self._stop.wait(self._pause)

    def _until_answered(self, method: Any, request: Any) -> Any:  # noqa: ANN401 - of a generated stub
        """Call again and again; return the answer, None where it is over."""
        while not self._stop.is_set():
            try:
                return method(request, timeout=5)
            except grpc.RpcError as error:
                self.failed[f"{type(request).__name__}: {error.code().name}"] += 1
                self._stop.wait(_AGAIN)
        return None


@contextmanager
def revokers(fleet: Fleet, *, per_second: float) -> Iterator[Revokers]:
    """Revoke through all replicas for the length of the block, `per_second` in all."""
    running = Revokers(fleet, per_second=per_second)
    running.start()
    try:
        yield running
    finally:
        running.stop()


class Witness:
    """A verifier of the audience payments, and which revocations it loaded, and how. Made by `witnesses`."""

    def __init__(self, fleet: Fleet, **more: Any) -> None:  # noqa: ANN401 - those of Verifier
        self.verifier = Verifier(
            audience="payments",
            issuer=ISSUER,
            trust=fleet.targets("trust"),
            identity=fleet.identity(PAYMENTS),
            ca_file=fleet.ca_file,
            broker_name=BROKER_NAME,
            **more,
        )
        self.deltas = 0
        self.snapshots = 0
        self.gaps: list[str] = []
        """Revocations that a delta left out, by what it said of itself: there must be none."""
        self._state = self.verifier._state
        self._apply = self._state.apply
        self._state.apply = self._watch  # type: ignore[method-assign] # what it loads is seen nowhere else
        self.epoch = 0

    def _watch(self, response: Response, **how: Any) -> Outcome:  # noqa: ANN401 - those of TrustState.apply
        before = self.version
        outcome = self._apply(response, **how)
        after = self.version
        if response.change is None or before == after:
            return outcome
        if response.change.snapshot:
            self.snapshots += 1
            if after < before:
                self.gaps.append(f"a snapshot led back from {before} to {after}")
            return outcome
        self.deltas += 1
        versions = [entry.version for entry in response.change.entries]
        if versions != [*range(before + 1, after + 1)]:
            self.gaps.append(f"a delta led from {before} to {after} by {versions}")
        return outcome

    @property
    def version(self) -> int:
        """The last revocation that is loaded, 0 before the first answer."""
        position = self.verifier.position()
        return 0 if position is None else position.revocation_version

    def verdict(self, token: str, peer: bytes) -> str:
        """Return ``accepted``, or why not."""
        try:
            self.verifier.verify(token, peer_certificate=peer)
        except InvalidTokenError as error:
            return str(error.reason)
        except CarnetError as error:
            return error.code
        return "accepted"

    def wait_for(self, version: int, within: float) -> None:
        """Wait until the revocation `version` is loaded."""
        deadline = time.monotonic() + within
        while self.version < version:
            assert time.monotonic() < deadline, f"not at {version} within {within} s: {self.verifier.status()}"
            time.sleep(0.02)


@contextmanager
def witnesses(fleet: Fleet, count: int, **more: Any) -> Iterator[list[Witness]]:  # noqa: ANN401 - those of Verifier
    """Start so many verifiers; they end with the block."""
    with ExitStack() as stack:
        made = [Witness(fleet, **more) for _ in range(count)]
        for witness in made:
            stack.enter_context(witness.verifier)
        for witness in made:
            witness.verifier.wait_ready(timedelta(seconds=20))
        yield made
