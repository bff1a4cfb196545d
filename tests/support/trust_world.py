"""A small world of brokers and verifiers around one Vault and one store, in which the real code runs.

Of the brokers the rotation driver, the loop of the store, and the trust streams (`edges.grpc.watch`); of the verifiers
all that decides (`carnet.trust_state`, `carnet.watch_protocol`, `carnet.revocations`). Made up are the clocks, the
network, and Vault and store, which pass the contract suites of the real ones. Time stands until it is moved.
"""

from __future__ import annotations

import asyncio
import heapq
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from carnet.claims import Claims
from carnet.errors import CarnetError
from carnet.jwk import PublicJWK
from carnet.keysets import KeySetRules, Moment
from carnet.revocations import Revocation, RevocationKind
from carnet.spiffe import SpiffeID
from carnet.trust_messages import RefusedResponseError
from carnet.trust_state import SavedTrust, TrustState
from carnet.trust_wire import request_message, watch_response
from carnet.v1 import trust_pb2
from carnet.watch_protocol import WatchProtocol
from carnet_broker.core.keyring import Keyring, KeyringRegressionError
from carnet_broker.core.keyring_document import keyring_of_content
from carnet_broker.core.revocation import RevocationRules, new_revocation
from carnet_broker.edges.grpc.trust_knowledge import TrustKnowledge
from carnet_broker.edges.grpc.watch import Watchers, WatchRules
from carnet_broker.ports import KeyStoreUnavailableError, LogPosition, StoredKey, StoreUnavailableError
from carnet_broker.revocation_view import RevocationHolder
from carnet_broker.rotation import RotationDriver
from carnet_broker.signing import KeyringHolder, NoSigningKeyError
from carnet_broker.store_loop import StoreLoop, StorePorts, StoreTiming
from support.fakes import FakeKeyringDocument, FakeKeyStore, FakeRotationRequests
from support.keyrings import ISSUER, SECOND, T0
from support.keyrings import TIMING as USUAL
from support.store_fakes import FakeStoreData

__all__ = ["HEARTBEAT", "LEASE", "LIFE", "MAX_STALENESS", "TIMING", "Broker", "Token", "TrustWorld", "Verifier"]

TIMING: Final = replace(USUAL, min_interval=5 * SECOND, poller_interval=0 * SECOND)
"""A rotation may follow a publication within `MAX_STALENESS`: so the permits alone save those who watch."""
LEASE: Final = 15 * SECOND
MAX_STALENESS: Final = 40 * SECOND
HEARTBEAT: Final = 5 * SECOND
LIFE: Final = 60 * SECOND
"""Of a token."""
RULES: Final = RevocationRules(longest_life=LIFE, max_leaf_life=300 * SECOND, leeway=TIMING.leeway, skew=TIMING.skew)
SUBJECTS: Final = ("spiffe://prod.example/sa/orders", "spiffe://prod.example/sa/cron")
CERTIFICATES: Final = ("A" * 43, "B" * 42 + "A")
SERVICE: Final = SpiffeID.parse("spiffe://prod.example/sa/payments")
_POLICY: Final = SimpleNamespace(
    audiences={"payments": SimpleNamespace(served_by=[SimpleNamespace(matches=lambda _: True)])}
)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands until it is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 0.0

    def time(self) -> float:
        """Return the seconds that have passed in the world."""
        return self.at

    def settle(self) -> None:
        """Run until nothing is left that could run now."""
        while True:
            self.call_soon(self.stop)
            self.run_forever()
            timers = self._scheduled  # type: ignore[attr-defined]
            while timers and timers[0]._cancelled:
                heapq.heappop(timers)._scheduled = False
            if not self._ready and not (timers and timers[0]._when <= self.at):  # type: ignore[attr-defined]
                return


class Clock:
    """The clocks of one process: the wall is off by a skew, and the monotonic one stands still in a suspend."""

    def __init__(self, world: TrustWorld, skew: timedelta = timedelta()) -> None:
        self._world = world
        self._skew = skew
        self.slept = timedelta()

    def now(self) -> datetime:
        """Return the wall time."""
        return T0 + self._world.passed + self._skew

    def mono(self) -> float:
        """Return monotonic seconds."""
        return (self._world.passed - self.slept).total_seconds()


class NumberedKeyStore(FakeKeyStore):
    """The same keys each time: what is found can be found again."""

    def create(self) -> StoredKey:
        """Make the next key."""
        key = ec.derive_private_key(2_000_003 + len(self.versions), ec.SECP256R1())
        jwk = PublicJWK.of(key.public_key())
        self.keys[jwk.kid], self.versions[jwk.kid] = key, None
        return StoredKey(jwk, None)


class Link:
    """A port at the other end of a link that can be cut."""

    def __init__(self, port: object, is_up: Callable[[], bool], error: type[CarnetError]) -> None:
        self._port = port
        self._is_up = is_up
        self._error = error

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a method of any port
        if not self._is_up():
            msg = "the link is cut"
            raise self._error(msg)
        return getattr(self._port, name)


@dataclass(frozen=True, slots=True)
class Token:
    """What a verifier is shown."""

    kid: str
    claims: Claims


class Broker:
    """One broker process."""

    def __init__(self, world: TrustWorld, replica_id: str, skew: timedelta) -> None:
        self.world = world
        self.replica_id = replica_id
        self.clock = Clock(world, skew)
        self.vault_up = self.store_up = True
        self.generations: list[int] = []
        self.positions: list[LogPosition] = []
        self.restored = 0
        self.streams: list[Stream] = []
        self.keys = KeyringHolder(island=TIMING.island, confirm_within=TIMING.island / 2)
        self.revocations = RevocationHolder()
        vault = [
            Link(port, lambda: self.vault_up, KeyStoreUnavailableError)
            for port in (world.document, world.key_store, world.requests)
        ]
        store = world.data.open(settled=30 * SECOND)
        linked: Any = {
            name: Link(getattr(store, name), lambda: self.store_up, StoreUnavailableError)
            for name in ("revocations", "sessions", "rollout", "replicas", "mirror", "wakeups")
        }
        self.loop = StoreLoop(
            StorePorts(
                log=linked["revocations"],
                sessions=linked["sessions"],
                rollout=linked["rollout"],
                leases=linked["replicas"],
                mirror=linked["mirror"],
                wakeups=linked["wakeups"],
            ),
            self.revocations,
            self.clock,
            _StoreHeard(self),
            replica_id=replica_id,
            version="model",
            timing=StoreTiming(poll_interval=SECOND, lease=LEASE, append_within=5 * SECOND),
            generation=lambda: self.generation,
            changed=lambda: self.watchers.changed(),  # noqa: PLW0108 - it is made later
            newer_keyring=self._read_keyring,
            sessions_written=lambda _: None,
        )
        self.driver: Any = RotationDriver(
            document=vault[0],
            store=vault[1],
            requests=vault[2],
            holder=self.keys,
            events=_RotationHeard(self),
            issuer=ISSUER,
            store_name="kv",
            timing=TIMING,
            rollout=linked["rollout"],
            mirror=linked["mirror"],
            replicas=self.loop.replicas_seen,
        )
        self.watchers: Watchers = world.events.run_until_complete(self._watchers())

    @property
    def generation(self) -> int:
        """The generation that it serves, 0 for none."""
        return 0 if self.keys.view is None else self.keys.view.keyring.generation

    async def _watchers(self) -> Watchers:
        async def read_keyring() -> bool:
            return self.tick()

        async def read_store(claim: LogPosition | None) -> bool:
            if claim is not None:
                self.loop._claims.append(claim)
            return self.round()

        known = TrustKnowledge(
            keys=self.keys,
            revocations=self.revocations,
            policy=lambda: _POLICY,  # type: ignore[arg-type,return-value]
            clock=self.clock,
            max_staleness=MAX_STALENESS,
            read_keyring=read_keyring,
            read_store=read_store,
        )
        rules = WatchRules(replica_id=self.replica_id, heartbeat=HEARTBEAT, max_age=TIMING.max_age)
        admission: Any = SimpleNamespace(admit=lambda *_: None)
        events: Any = SimpleNamespace(streams=lambda _: None, pushed=lambda *_: None, left=lambda _: None)
        return Watchers(known, rules, self.clock, admission, events, report=self.loop.report)

    def _read_keyring(self) -> None:
        self.tick()

    def tick(self) -> bool:
        """Do a round of the rotation driver; say whether Vault answered."""
        try:
            self.driver.tick(self.clock)
        except StoreUnavailableError:
            return True
        except (KeyStoreUnavailableError, KeyringRegressionError):
            return False
        return True

    def round(self) -> bool:
        """Do a round of the loop of the store; say whether it went well."""
        self.loop._attempt(self.loop._reading, self.loop.round)
        self.world.events.call_soon(lambda: None)
        return not self.loop._reading.failing

    def issue(self, subject: str, certificate: str) -> Token | None:
        """Issue a token, None where this broker may not."""
        now, mono = self.clock.now(), self.clock.mono()
        view, version = self.revocations.view, self.revocations.version
        if view is None or view.age(now, mono) > MAX_STALENESS:
            return None
        revoked = self.revocations.revocations
        if revoked.blocks(subject) or revoked.revokes_certificate([f"sha256:{certificate}"]):
            return None
        try:
            key, _ = self.keys.signing_key(now, mono)
        except NoSigningKeyError:
            return None
        self.world.tokens_made += 1
        return Token(
            key.kid,
            Claims(
                issuer=ISSUER,
                subject=SpiffeID.parse(subject),
                audience="payments",
                client_id=SpiffeID.parse(subject),
                expires_at=now + LIFE,
                issued_at=now,
                not_before=now,
                token_id=f"token-{self.world.tokens_made:012d}",
                scopes=("charge",),
                confirmation=certificate,
                revocation_version=version,
            ),
        )

    def revoke(self, kind: RevocationKind, value: str) -> tuple[Revocation, ...]:
        """Revoke, and return what was made durable; nothing where the store cannot be reached."""
        try:
            return self.loop._append([new_revocation(kind, value, now=self.clock.now(), rules=RULES)]).entries
        except StoreUnavailableError:
            return ()

    def die(self) -> None:
        """End at once, and say nothing to anybody but by closed connections."""
        for stream in self.streams:
            stream.task_over = True
            if stream.task is not None:
                stream.task.cancel()
        self.watchers._report_change = lambda *_: None
        self.world.events.settle()


class _StoreHeard:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def store_answered(self) -> None:
        pass

    def store_failed(self, error: Exception) -> None:
        if not isinstance(error, StoreUnavailableError):
            raise error

    def store_restored(self, seen: LogPosition, found: LogPosition) -> None:
        self._broker.restored += 1

    def revocations_read(self, position: LogPosition, count: int) -> None:
        pass

    def verifiers_counted(self, live: int) -> None:
        pass

    def lease_renewed(self, *, live_replicas: int, clock_offset: float) -> None:
        pass


class _RotationHeard:
    """What the driver tells of; most of it is nobody's business here."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def adopted(self, keyring: Keyring) -> None:
        self._broker.generations.append(keyring.generation)
        self._broker.watchers.changed()

    def permitted(self, permit: Any, left_behind: Any) -> None:  # noqa: ANN401
        self._broker.world.permits.add((permit.generation, permit.kid))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class Stream:
    """One connection between a verifier and a broker: nothing is lost or reordered as long as it lasts."""

    def __init__(self, verifier: Verifier, broker: Broker) -> None:
        self.verifier = verifier
        self.broker = broker
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.task: asyncio.Task[None] | None = None
        self.task_over = False
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        broker.streams.append(self)

    # -- what the broker sees: a `LongCall` ------------------------------------------------------------------------

    def workload(self) -> Any:  # noqa: ANN401 - as much of a Workload as is looked at
        """Return who is at the other end."""
        return SimpleNamespace(spiffe_id=SERVICE, not_after=T0 + timedelta(days=365))

    async def first(self) -> bytes:
        """Return the first request."""
        request = await self._inbox.get()
        assert request is not None
        return request

    async def next(self) -> bytes | None:
        """Return the next request."""
        return await self._inbox.get()

    async def write(self, response: bytes) -> None:
        """Send."""
        self.down.append(response)

    # -- the network -----------------------------------------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        """Whether anything gets through now."""
        return (self.verifier.number, self.broker.replica_id) not in self.broker.world.cut

    def carry_up(self) -> bool:
        """Bring one request to the broker."""
        if not self.up or not self.is_up or self.task_over:
            return False
        self._inbox.put_nowait(self.up.popleft())
        if self.task is None:
            self.task = self.broker.world.events.create_task(self._serve())
        self.broker.world.events.settle()
        return True

    def carry_down(self) -> bool:
        """Bring one response to the verifier, or the end of the stream."""
        if self.verifier.stream is not self or not self.is_up or self.verifier.suspended:
            return False
        if self.down:
            self.verifier.take(self.down.popleft())
            return True
        if self.task_over:
            self.verifier.stream = None
            return True
        return False

    def hang_up(self) -> None:
        """Close it at the verifier's end; the broker notices where the network works."""
        self.verifier.stream = None
        self.up.clear()
        if self.is_up and self.task is not None and not self.task_over:
            self._inbox.put_nowait(None)
            self.broker.world.events.settle()

    async def _serve(self) -> None:
        try:
            await self.broker.watchers.serve(self)  # type: ignore[arg-type]
        except CarnetError:
            pass
        finally:
            self.task_over = True


class Verifier:
    """One verifier process, with what it learns by its stream."""

    def __init__(self, world: TrustWorld, number: int, skew: timedelta) -> None:
        self.world = world
        self.number = number
        self.skew = skew
        self.kept: SavedTrust | None = None
        self.kept_at = T0
        self.starts = 0
        self.begin()

    def begin(self, *, with_kept: bool = False) -> None:
        """Start the process."""
        self.starts += 1
        self.clock = Clock(self.world, self.skew)
        self.suspended = False
        self.admitted = False
        self.stream: Stream | None = None
        self.heard_at = 0.0
        self.refused: dict[str, Revocation] = {}
        rules = KeySetRules(max_staleness=MAX_STALENESS)
        self.state = TrustState(rules, issuer=ISSUER, now=self.moment(), follows_revocations=True)
        self.protocol: WatchProtocol | None = None
        if with_kept and self.kept is not None:
            age = self.kept.age + max(self.clock.now() - self.kept_at, timedelta())
            if age <= MAX_STALENESS:
                kept = self.kept
                saved = SavedTrust(kept.position, kept.keys, kept.max_age, kept.entries, age)
                self.state.restore(saved, self.moment())

    def moment(self) -> Moment:
        """Read both clocks."""
        return Moment(self.clock.mono(), self.clock.now())

    def keep(self) -> None:
        """Write down what is known."""
        saved = self.state.saved(self.moment())
        if saved is not None:
            self.kept, self.kept_at = saved, self.clock.now()

    def connect(self, broker: Broker) -> None:
        """Begin a stream."""
        if self.stream is not None:
            self.stream.hang_up()
        self.stream = Stream(self, broker)
        self.heard_at = self.clock.mono()
        name = f"verifier-{self.number}-{self.starts}"
        self.protocol = WatchProtocol(self.state, instance_id=name, audience="payments", accepts_stale=False)
        self.say(self.protocol.hello(self.moment()))

    def say(self, said: Any) -> None:  # noqa: ANN401 - any of the requests
        """Send."""
        assert self.stream is not None
        self.stream.up.append(request_message(said).SerializeToString())

    def take(self, message: bytes) -> None:
        """Take a response in, and answer it."""
        assert self.protocol is not None
        assert self.stream is not None
        response = watch_response(trust_pb2.WatchResponse.FromString(message))
        self.heard_at = self.clock.mono()
        try:
            self.protocol.receive(response, self.moment())
        except RefusedResponseError:
            self.stream.hang_up()
            return
        self.admitted = response.live and self.state.keys.usable(self.moment()) is not None
        self.say(self.protocol.answer(self.moment()))

    def goodbye(self) -> None:
        """End in good order."""
        if self.stream is not None and self.protocol is not None:
            self.say(self.protocol.goodbye())
        self.admitted = False

    def look_at_the_time(self) -> None:
        """Leave a broker that says nothing, and see whether the knowledge at hand is too old."""
        if self.suspended:
            return
        if self.state.keys.usable(self.moment()) is None:
            self.admitted = False
        if self.stream is not None and self.protocol is not None:
            quiet = timedelta(seconds=self.clock.mono() - self.heard_at)
            if quiet > self.protocol.patience:
                self.stream.hang_up()

    def judge(self, token: Token) -> str:
        """Return what becomes of a token that is shown to it: its own words, without the signature."""
        now = self.moment()
        keys = self.state.keys.usable(now)
        if keys is None:
            return "stale"
        if keys.get(token.kid) is None:
            return "unknown key"
        if token.claims.expires_at <= now.wall:
            return "over"
        entry = self.state.revocations.refusal(token.claims)
        if entry is not None:
            self.refused[token.claims.token_id] = entry
            return "revoked"
        return "accepted"


class TrustWorld:
    """All of it, and what is true whoever knows it."""

    def __init__(self, *, brokers: int, verifiers: int, skews: tuple[int, ...] = (0,)) -> None:
        self.passed = timedelta()
        self.events = VirtualLoop()
        clock = Clock(self)
        self.data = FakeStoreData(now=clock.now, elapsed=lambda: self.passed)
        self.document = FakeKeyringDocument()
        self.key_store = NumberedKeyStore()
        self.requests = FakeRotationRequests()
        self.permits: set[tuple[int, str]] = set()
        self.cut: set[tuple[int, str]] = set()
        self.tokens: list[Token] = []
        self.tokens_made = 0
        self._keyrings: dict[int, Keyring] = {}
        self.skews = [skew * SECOND / 2 for skew in skews]
        self.born = 0
        self.brokers: list[Broker] = []
        for _ in range(brokers):
            self.brokers.append(self.new_broker())
        self.verifiers = [Verifier(self, n, self.skews[n % len(skews)]) for n in range(verifiers)]

    def new_broker(self) -> Broker:
        """Start a broker."""
        self.born += 1
        return Broker(self, f"broker-{self.born}", self.skews[self.born % len(self.skews)])

    def restart(self, number: int) -> None:
        """Kill a broker, and start another in its place."""
        self.brokers[number].die()
        self.brokers[number] = self.new_broker()

    def close(self) -> None:
        """Let go of the event loop."""
        for task in asyncio.all_tasks(self.events):
            task.cancel()
        self.events.settle()
        for broker in self.brokers:
            broker.loop._appending.shutdown(wait=False)
        self.events.close()

    # -- what happens ----------------------------------------------------------------------------------------------

    def pass_time(self, duration: timedelta) -> None:
        """Move all clocks; whoever is suspended does not notice on the monotonic one."""
        self.passed += duration
        for verifier in self.verifiers:
            if verifier.suspended:
                verifier.clock.slept += duration
        self.events.at = self.passed.total_seconds()
        self.events.settle()
        for verifier in self.verifiers:
            verifier.look_at_the_time()

    def carry_all(self) -> None:
        """Bring all that was said to where it belongs, as far as the network lets it."""
        for _ in range(50):
            streams = [stream for broker in self.brokers for stream in broker.streams]
            moved = [step() for stream in streams for step in (stream.carry_up, stream.carry_down)]
            if not any(moved):
                return
        msg = "the talk does not end"
        raise AssertionError(msg)

    def run(self, seconds: int, *, step: int = 2, check: Callable[[], None] = lambda: None) -> None:
        """Let all go on as it does by itself."""
        for _ in range(0, seconds, step):
            self.pass_time(step * SECOND)
            for broker in list(self.brokers):
                broker.tick()
                broker.round()
                broker.streams = [one for one in broker.streams if not one.task_over or one.verifier.stream is one]
                check()
            turn = int(self.passed.total_seconds())
            for verifier in self.verifiers:
                if verifier.stream is None and not verifier.suspended:
                    verifier.connect(self.brokers[(verifier.number + turn) % len(self.brokers)])
            self.carry_all()
            check()

    def issue(self, number: int, subject: int = 0, certificate: int = 0) -> Token | None:
        """Have a token issued."""
        token = self.brokers[number].issue(SUBJECTS[subject], CERTIFICATES[certificate])
        if token is not None:
            self.tokens.append(token)
        return token

    # -- what is true ----------------------------------------------------------------------------------------------

    def keyring(self, number: int = -1) -> Keyring:
        """Return a keyring of Vault, by default the one in force."""
        if not self.document.written:
            return Keyring(issuer=ISSUER)
        place = number % len(self.document.written)
        if place not in self._keyrings:
            content = json.loads(self.document.written[place])
            self._keyrings[place] = keyring_of_content(content, issuer=ISSUER, store="kv")
        return self._keyrings[place]

    def stored(self) -> list[Revocation]:
        """Return the entries of the store."""
        with self.data._lock:
            return list(self.data._tables.entries)
