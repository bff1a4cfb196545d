"""Load on a running broker: tokens issued and verified at a steady rate while something else happens to it."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import grpc

from carnet import Identity, Verifier
from carnet.endpoints import Target
from carnet.errors import InvalidTokenError, KeySetUnavailableError
from carnet.keyset_source import KeySetSource, TrustServers, TrustServiceSource
from carnet.keysets import KeySetSnapshot
from carnet.v1 import token_pb2, token_pb2_grpc
from carnet.verify import parse_unverified
from support.running_broker import BROKER_NAME, ISSUER, PAYMENTS, RunningBroker

__all__ = ["Load", "Tally", "counting_verifier"]


@dataclass
class Tally:
    """What happened. A good token is one that its issuer's clock says is valid."""

    issued: int = 0
    issue_failures: Counter[str] = field(default_factory=Counter)
    verified: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    by_key: Counter[str] = field(default_factory=Counter)
    fetches_for_a_missing_key: int = 0


class _CountingSource:
    """Counts how often the verifier had to ask for a key that it missed: a rotation without gaps needs none."""

    def __init__(self, inner: KeySetSource, tally: Tally) -> None:
        self._inner = inner
        self._tally = tally

    def fetch(self, missing_kid: str | None, *, at_least: int) -> KeySetSnapshot:
        self._tally.fetches_for_a_missing_key += missing_kid is not None
        return self._inner.fetch(missing_kid, at_least=at_least)

    def close(self) -> None:
        self._inner.close()


def counting_verifier(broker: RunningBroker, tally: Tally) -> Verifier:
    """Return a verifier of the audience payments that polls the broker's trust listener."""
    servers = TrustServers(
        targets=[Target.parse(broker.addresses["trust"])],
        identity=broker.identity(PAYMENTS),
        ca_pem=broker.ca.root_pem,
        server_name=BROKER_NAME,
        timeout=timedelta(seconds=2),
    )
    return Verifier(
        audience="payments", issuer=ISSUER, source=lambda: _CountingSource(TrustServiceSource(servers), tally)
    )


class Load:
    """Issues and verifies in threads until the block ends."""

    def __init__(self, broker: RunningBroker, *, issues_per_second: float, verifies_per_second: float) -> None:
        self.tally = Tally()
        self._broker = broker
        self._issue_pause = 1 / issues_per_second
        self._verify_pause = 1 / verifies_per_second
        self._identity: Identity = broker.identity()
        self._alive: deque[tuple[datetime, str]] = deque()
        self._stop = threading.Event()
        self._verifier = counting_verifier(broker, self.tally)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._issue, self._verify)]

    def __enter__(self) -> Tally:
        self._verifier.wait_ready()
        for thread in self._threads:
            thread.start()
        return self.tally

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        self._verifier.close()

    def _issue(self) -> None:
        with self._broker.channel(self._identity) as channel:
            stub = token_pb2_grpc.TokenServiceStub(channel)
            request = token_pb2.IssueTokenRequest(audience="payments")
            for _ in self._beats(self._issue_pause):
                try:
                    token = stub.IssueToken(request, timeout=5).token
                except grpc.RpcError as error:
                    self.tally.issue_failures[f"{error.code().name}: {error.details()}"] += 1
                    continue
                unverified = parse_unverified(token)
                end = datetime.fromtimestamp(unverified.unverified_payload["exp"], UTC)
                self._alive.append((end, token))
                self.tally.issued += 1
                self.tally.by_key[unverified.kid] += 1

    def _verify(self) -> None:
        rng = random.Random(1)  # noqa: S311 - picks a token, guards nothing
        for _ in self._beats(self._verify_pause):
            now = datetime.now(UTC)
            while self._alive and self._alive[0][0] <= now:
                self._alive.popleft()
            if not self._alive:
                continue
            # The oldest is signed by the oldest key, the newest by the newest: both ends are where it breaks.
            _, token = self._alive[rng.choice([0, -1, rng.randrange(len(self._alive))])]
            try:
                self._verifier.verify(token, peer_certificate=self._identity.certificate, now=now)
            except (InvalidTokenError, KeySetUnavailableError) as error:
                self.tally.refused[str(getattr(error, "reason", error.code))] += 1
            else:
                self.tally.verified += 1

    def _beats(self, pause: float) -> Iterator[None]:
        due = time.monotonic()
        while not self._stop.is_set():
            yield
            due = max(due + pause, time.monotonic() - 1)
            self._stop.wait(max(0.0, due - time.monotonic()))
