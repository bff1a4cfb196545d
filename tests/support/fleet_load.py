"""Load on a fleet: tokens issued through all replicas, and each verified by many verifiers as soon as it is there.

::

    with FleetLoad(fleet, {"stream": [...], "timer": [...]}, issues_per_second=60) as load:
        ...
    load.refused["stream"]

A token is good as long as it is not over by the clock that its issuer reads too, and its key is not one that the test
has had revoked (`revoked`). Besides verdicts there is a second measure, which does not depend on what a verifier does
about a key that it misses: for each key, the lowest generation that a verifier had loaded when a token of that key came
(`loaded`). Compared with the generation in which the key was published, it tells whether anybody had not loaded it.
"""

from __future__ import annotations

import queue
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeAlias

import grpc

from carnet import Identity, Verifier
from carnet.errors import InvalidTokenError, KeySetUnavailableError
from carnet.tls import secure_channel
from carnet.v1 import token_pb2, token_pb2_grpc
from carnet.verify import parse_unverified
from support.fleet import Fleet
from support.running_broker import BROKER_NAME, ISSUER, PAYMENTS
from support.timer_verifier import TimerVerifier

__all__ = [
    "FleetLoad",
    "Judge",
    "StreamJudge",
    "TimerJudge",
    "key_set_questions",
    "published_in",
    "stream_judges",
    "timer_judges",
]

_Item: TypeAlias = tuple[str, str, datetime, float]
"""A token, its kid, its end, and when it came on the monotonic clock."""

_ALIVE: Final = 200
"""Tokens that each verifier keeps, to verify one again."""


class Judge(Protocol):
    """A verifier under load."""

    def loaded(self) -> int | None:
        """Return the generation of the key set that it has, None where it does not know generations."""

    def judge(self, token: str, caller: Identity, now: datetime) -> None:
        """Raise `InvalidTokenError` or `KeySetUnavailableError` for a token that it refuses."""


class StreamJudge:
    """The verifier of the SDK, kept up to date by a stream."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    def loaded(self) -> int | None:
        """See `Judge`."""
        position = self.verifier.position()
        return 0 if position is None else position.generation

    def judge(self, token: str, caller: Identity, now: datetime) -> None:
        """See `Judge`."""
        self.verifier.verify(token, peer_certificate=caller.certificate, now=now)


class TimerJudge:
    """The verifier that fetches by a timer."""

    def __init__(self, verifier: TimerVerifier) -> None:
        self.verifier = verifier

    def loaded(self) -> int | None:
        """See `Judge`."""
        return None

    def judge(self, token: str, caller: Identity, now: datetime) -> None:
        """See `Judge`."""
        self.verifier.verify(token, peer_thumbprint=caller.thumbprint, now=now)


@contextmanager
def stream_judges(fleet: Fleet, number: int) -> Iterator[list[StreamJudge]]:
    """Run verifiers of the SDK with its defaults, spread over the replicas; all are live before the block begins."""
    identity, targets = fleet.identity(PAYMENTS), fleet.targets("trust")
    with ExitStack() as stack:
        judges = []
        for one in range(number):
            first = one % len(targets)
            verifier = Verifier(
                audience="payments",
                issuer=ISSUER,
                trust=targets[first:] + targets[:first],
                identity=identity,
                ca_file=fleet.ca_file,
                broker_name=BROKER_NAME,
            )
            judges.append(StreamJudge(stack.enter_context(verifier)))
        deadline = time.monotonic() + 10
        for judge in judges:
            judge.verifier.wait_ready()
            while not judge.verifier.status().live:
                assert time.monotonic() < deadline, judge.verifier.status()
                time.sleep(0.02)
        yield judges


@contextmanager
def timer_judges(fleet: Fleet, number: int, *, every: timedelta) -> Iterator[list[TimerJudge]]:
    """Run verifiers that fetch by a timer, spread over the replicas and over the time."""
    plain = fleet.targets("plain")
    with ExitStack() as stack:
        yield [
            TimerJudge(
                stack.enter_context(
                    TimerVerifier(
                        plain[one % len(plain)],
                        issuer=ISSUER,
                        audience="payments",
                        every=every,
                        delay=every * one / number,
                    )
                )
            )
            for one in range(number)
        ]


class FleetLoad:
    """Issues through every replica and has every verifier judge every token, until the block ends."""

    def __init__(
        self, fleet: Fleet, judges: Mapping[str, Sequence[Judge]], *, issues_per_second: float, again: bool = True
    ) -> None:
        """`judges` by kind. `again`: whether a verifier also verifies an earlier token for each that comes."""
        self.issued = 0
        self.issue_failures: Counter[str] = Counter()
        self.by_key: Counter[str] = Counter()
        self.verified: Counter[str] = Counter()
        self.refused: dict[str, Counter[str]] = {kind: Counter() for kind in judges}
        """Good tokens that were refused, by kind of verifier and reason."""
        self.loaded: dict[str, int] = {}
        """The lowest generation that a verifier had loaded when a token of the key came."""
        self.longest_wait = 0.0
        """The longest time, in seconds, that a token waited for a verifier after it came."""
        self.revoked: set[str] = set()
        """Keys that the test has had revoked: from then on a token of theirs may be refused."""
        self.refused_of_revoked: Counter[str] = Counter()
        self.issued_of_revoked: Counter[str] = Counter()
        """Tokens that came from a broker although their key was revoked: it had not heard yet."""
        self.latest: dict[int, tuple[str, str]] = {}
        """The newest token of each replica, with its kid."""
        self._fleet = fleet
        self._caller = fleet.identity()
        self._again = again
        self._judges = [judge for members in judges.values() for judge in members]
        self._pause = len(fleet) / issues_per_second
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._queues: list[queue.SimpleQueue[_Item | None]] = []
        self._issuing = [
            threading.Thread(target=self._issue, args=(number,), daemon=True) for number in range(len(fleet))
        ]
        self._judging = []
        for kind, members in judges.items():
            for judge in members:
                inbox: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
                self._queues.append(inbox)
                self._judging.append(threading.Thread(target=self._judge, args=(kind, judge, inbox), daemon=True))

    @property
    def caller(self) -> Identity:
        """Whose tokens they are."""
        return self._caller

    def __enter__(self) -> Self:
        for thread in (*self._judging, *self._issuing):
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._issuing:
            thread.join(10)
        for inbox in self._queues:
            inbox.put(None)
        for thread in self._judging:
            thread.join(10)

    def figures(self) -> dict[str, Any]:
        """Return the figures for `support.measurements.record`."""
        return {
            "issued": self.issued,
            "issues_failed": sum(self.issue_failures.values()),
            "keys": len(self.by_key),
            "verified": dict(self.verified),
            "longest_wait_for_a_verifier_ms": round(1000 * self.longest_wait),
            "good_tokens_refused": {kind: sum(reasons.values()) for kind, reasons in self.refused.items()},
        }

    def not_loaded(self, published: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Return the keys of which a token came to a verifier that had not loaded them.

        `published` is the generation in which each key was published; the answer has that which was loaded too.
        """
        return {kid: (published[kid], loaded) for kid, loaded in self.loaded.items() if loaded < published[kid]}

    def _issue(self, number: int) -> None:
        target = self._fleet.targets("tokens")[number]
        request = token_pb2.IssueTokenRequest(audience="payments")
        with secure_channel(
            target, identity=self._caller, ca_pem=self._fleet.ca.root_pem, server_name=BROKER_NAME
        ) as channel:
            stub = token_pb2_grpc.TokenServiceStub(channel)
            due = time.monotonic()
            while not self._stop.is_set():
                try:
                    token = stub.IssueToken(request, timeout=5).token
                except grpc.RpcError as error:
                    with self._lock:
                        self.issue_failures[f"{error.code().name}: {error.details()}"] += 1
                else:
                    self._hand_out(number, token)
                due = max(due + self._pause, time.monotonic() - 1)
                self._stop.wait(max(0.0, due - time.monotonic()))

    def _hand_out(self, number: int, token: str) -> None:
        unverified = parse_unverified(token)
        loaded = [generation for judge in self._judges if (generation := judge.loaded()) is not None]
        end, came = datetime.fromtimestamp(unverified.unverified_payload["exp"], UTC), time.monotonic()
        for inbox in self._queues:
            inbox.put((token, unverified.kid, end, came))
        with self._lock:
            self.issued += 1
            if loaded:
                self.loaded[unverified.kid] = min(*loaded, self.loaded.get(unverified.kid, loaded[0]))
            self.by_key[unverified.kid] += 1
            self.issued_of_revoked[unverified.kid] += unverified.kid in self.revoked
            self.latest[number] = token, unverified.kid

    def _judge(self, kind: str, judge: Judge, inbox: queue.SimpleQueue[_Item | None]) -> None:
        rng = random.Random(1)  # noqa: S311 - picks a token, guards nothing
        alive: deque[_Item] = deque(maxlen=_ALIVE)
        while (item := inbox.get()) is not None:
            with self._lock:
                self.longest_wait = max(self.longest_wait, time.monotonic() - item[3])
            self._verify(kind, judge, item)
            if self._again:
                while alive and alive[0][2] <= datetime.now(UTC):
                    alive.popleft()
                if alive:
                    # The oldest is signed by the oldest key, and those go first.
                    self._verify(kind, judge, alive[rng.choice([0, rng.randrange(len(alive))])])
            alive.append(item)

    def _verify(self, kind: str, judge: Judge, item: _Item) -> None:
        token, kid, end, _ = item
        now = datetime.now(UTC)
        if now >= end:
            return
        try:
            judge.judge(token, self._caller, now)
        except (InvalidTokenError, KeySetUnavailableError) as error:
            with self._lock:
                if kid in self.revoked:
                    self.refused_of_revoked[kind] += 1
                else:
                    self.refused[kind][str(getattr(error, "reason", error.code))] += 1
        else:
            with self._lock:
                self.verified[kind] += 1


def published_in(fleet: Fleet) -> Mapping[str, int]:
    """Return the generation in which each key was published, by the logs of the replicas."""
    return {
        entry["kid"]: entry["generation"]
        for replica in fleet
        for entry in replica.broker.log()
        if entry.get("event") == "keyring_step" and entry["step"] == "PublishKey"
    }


_ASKED: Final = re.compile(r'^carnet_calls_total\{method="[^"]*GetKeySet",[^}]*\} ([0-9.e+]+)$', re.MULTILINE)


def key_set_questions(fleet: Iterable[Any]) -> int:
    """Return how often verifiers asked for a key set so far: who is told by a stream asks only for a key it misses."""
    return sum(
        round(float(number)) for replica in fleet for number in _ASKED.findall(replica.broker.get("/metrics")[1])
    )
