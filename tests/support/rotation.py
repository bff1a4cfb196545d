"""Rotation drivers over one Vault and one store in memory, with every call that they make to them at hand.

`Vault` is what all replicas share, `Replica` what one process has. A *tap* stands between the two: it gets the name of
each call and the call itself, and decides what becomes of it. The names of calls to the store begin with ``store.``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final, NoReturn, TypeAlias

from carnet_broker.core.keyring import Keyring, KeyringRegressionError, KeyState, Step, Timing, Wait
from carnet_broker.core.keyring_document import keyring_of_content
from carnet_broker.core.mirror import MirrorNotBelievedError, MirrorSignature, mirror_signing_input
from carnet_broker.core.requests import RequestKind, RequestStatus
from carnet_broker.core.rollout import Permit, VerifierSession
from carnet_broker.edges.vault.kv_store import KvSigner
from carnet_broker.ports import KeyLostError, KeyStoreUnavailableError, ReplicasSeen, StoreUnavailableError
from carnet_broker.rotation import RotationDriver, RotationProgress
from carnet_broker.signing import KeyringHolder
from support.fakes import FakeKeyringDocument, FakeKeyStore, FakeRotationRequests
from support.keyrings import ISSUER, T0, TIMING
from support.shared_store import SharedStore

__all__ = [
    "FAULTS",
    "FaultAt",
    "Heard",
    "KilledError",
    "ManualClock",
    "MemoryKept",
    "Replica",
    "Tap",
    "Vault",
    "go_wrong",
    "straight_through",
]

Tap: TypeAlias = Callable[[str, Callable[[], Any]], Any]


def straight_through(name: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - the answer of any call
    """Do the call."""
    del name
    return call()


class KilledError(BaseException):
    """The process is killed: nothing that the driver does catches this."""


class ManualClock:
    """A clock that stands until it is moved. `mono` may be held back, as in a suspend."""

    def __init__(self, now: datetime = T0) -> None:
        self._now = now
        self.slept = timedelta(0)

    def now(self) -> datetime:
        """Return the wall time."""
        return self._now

    def mono(self) -> float:
        """Return monotonic seconds."""
        return (self._now - T0 - self.slept).total_seconds()

    def pass_time(self, duration: timedelta) -> None:
        """Move both clocks."""
        self._now += duration

    def sleep(self, duration: timedelta) -> None:
        """Move the wall clock only."""
        self._now += duration
        self.slept += duration


@cache
def _parsed(document: str, store_name: str) -> Keyring:
    """Parse a document once: a long story looks at all that was ever written, after every call."""
    return keyring_of_content(json.loads(document), issuer=ISSUER, store=store_name)


class Vault:
    """What the replicas share."""

    def __init__(self, clock: ManualClock, *, versioned: bool = False) -> None:
        self.clock = clock
        self.store_name = "transit" if versioned else "kv"
        self.store = FakeKeyStore(versioned=versioned)
        self.document = FakeKeyringDocument()
        self.requests = FakeRotationRequests()
        self.shared = SharedStore(clock)

    @property
    def history(self) -> list[Keyring]:
        """Every keyring that was ever in force, oldest first."""
        return [self._parse(number) for number in range(len(self.document.written))]

    @property
    def keyring(self) -> Keyring:
        """The keyring in force."""
        return self._parse(-1) if self.document.written else Keyring(issuer=ISSUER)

    def _parse(self, number: int) -> Keyring:
        return _parsed(self.document.written[number], self.store_name)

    @property
    def states(self) -> list[KeyState]:
        """The states of the keys, oldest first."""
        return [key.state for key in self.keyring.keys]

    @property
    def orphans(self) -> set[str]:
        """The private keys that no entry of the keyring needs."""
        return set(self.store.keys) - {key.kid for key in self.keyring.live}

    @property
    def bereft(self) -> set[str]:
        """The live keys whose private key is not there."""
        return {key.kid for key in self.keyring.live} - set(self.store.keys)

    def mirror_signature(self, kid: str, content: dict[str, Any], generation: int | None = None) -> MirrorSignature:
        """Sign a mirror of `content` with the private key of `kid`, as a broker would, or a thief."""
        number = content["generation"] if generation is None else generation
        signing_input = mirror_signing_input(content, issuer=ISSUER, generation=number)
        return MirrorSignature(kid, KvSigner(kid, self.store.keys[kid]).sign(signing_input))

    def ask(self, kind: RequestKind = RequestKind.ROTATE, kid: str | None = None, *, breakglass: bool = False) -> str:
        """Put a request into the letter box, now."""
        return self.requests.submit(kind, kid, breakglass=breakglass, created_at=self.clock.now())

    def reason(self, request_id: str) -> str | None:
        """Return the reason of the answer to a request, None before there is one."""
        result = self.requests.result(request_id)
        return None if result is None else result.reason

    @property
    def unanswered(self) -> list[str]:
        """The requests that have no final answer."""
        final = {RequestStatus.DONE, RequestStatus.REFUSED}
        results = self.requests.results
        return [name for name in self.requests.requests if name not in results or results[name].status not in final]


@dataclass
class Heard:
    """What a driver told of itself."""

    steps: list[str] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    permits: list[tuple[Permit, list[str]]] = field(default_factory=list)
    """Each permit, with the instances of the verifiers that it left behind."""
    waiting: list[tuple[Wait | None, list[str]]] = field(default_factory=list)
    """What each round ended with, with the instances of the verifiers that it waits for."""
    regressions: int = 0
    refused_mirrors: list[str] = field(default_factory=list)

    def step_taken(self, step: Step, keyring: Keyring) -> None:
        """Keep the name of the step."""
        del keyring
        self.steps.append(type(step).__name__)

    def adopted(self, keyring: Keyring) -> None:
        """Keep the generation."""
        self.generations.append(keyring.generation)

    def key_lost(self, kid: str, error: KeyLostError) -> None:
        """Keep the kid."""
        del error
        self.lost.append(kid)

    def permitted(self, permit: Permit, left_behind: Sequence[VerifierSession]) -> None:
        """Keep the permit."""
        self.permits.append((permit, [session.instance_id for session in left_behind]))

    def waits(self, progress: RotationProgress) -> None:
        """Keep what is waited for."""
        self.waiting.append((progress.wait, [session.instance_id for session in progress.laggards]))

    def regressed(self, error: KeyringRegressionError) -> None:
        """Count it."""
        del error
        self.regressions += 1

    def mirror_refused(self, error: MirrorNotBelievedError) -> None:
        """Keep why."""
        self.refused_mirrors.append(str(error))


class _Tapped:
    """A port whose every call goes through a tap."""

    def __init__(self, port: object, tap: Callable[[], Tap], prefix: str = "") -> None:
        self._port = port
        self._tap = tap
        self._prefix = prefix

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a method of any port
        method = getattr(self._port, name)
        return lambda *args, **more: self._tap()(self._prefix + name, lambda: method(*args, **more))


class MemoryKept:
    """`ports.KeptKeyring` in memory."""

    def __init__(self) -> None:
        self.keyring: Keyring | None = None

    def keep(self, keyring: Keyring) -> None:
        """Keep it."""
        self.keyring = keyring

    def load(self) -> Keyring | None:
        """Return it."""
        return self.keyring


class Replica:
    """One process: a driver and what it holds. Its lease is renewed whenever the driver looks at the leases."""

    def __init__(
        self,
        vault: Vault,
        *,
        tap: Tap = straight_through,
        timing: Timing = TIMING,
        issuer: str = ISSUER,
        store_name: str | None = None,
        kept: MemoryKept | None = None,
    ) -> None:
        """`kept` is what the process before it left on its disk."""
        self.kept = kept or MemoryKept()
        self.vault = vault
        self.tap = tap
        self.heard = Heard()
        self.holder = KeyringHolder(island=timing.island, confirm_within=timing.island / 2)
        self.replica_id = f"replica-{uuid.uuid4()}"
        document, store, requests = (
            _Tapped(port, lambda: self.tap) for port in (vault.document, vault.store, vault.requests)
        )
        rollout, mirror = (
            _Tapped(port, lambda: self.tap, "store.") for port in (vault.shared.rollout, vault.shared.mirror)
        )
        self.driver = RotationDriver(
            document=document,
            store=store,
            requests=requests,
            holder=self.holder,
            events=self.heard,
            issuer=issuer,
            store_name=store_name or vault.store_name,
            timing=timing,
            rollout=rollout,
            mirror=mirror,
            replicas=self.replicas,
            kept=self.kept,
        )

    @property
    def generation(self) -> int:
        """The generation that it serves, 0 for none."""
        return 0 if self.holder.view is None else self.holder.view.keyring.generation

    def replicas(self) -> ReplicasSeen:
        """Renew the lease, and return what the store says of all replicas."""
        return self.vault.shared.renew(self.replica_id, self.generation)

    def tick(self) -> datetime | None:
        """Do one round."""
        return self.driver.tick(self.vault.clock)

    def signs_with(self) -> str:
        """Return the kid of the key that it signs with now. Raises `NoSigningKeyError`."""
        clock = self.vault.clock
        key, signer = self.holder.signing_key(clock.now(), clock.mono())
        assert key.kid == signer.kid
        return key.kid


class FaultAt:
    """A tap at which the `number`-th call (from 0) goes wrong in one of the ways of `FAULTS`; the others go through."""

    def __init__(self, number: int, fault: str) -> None:
        self._number = number
        self._fault = fault
        self.calls: list[str] = []
        self.struck: str | None = None
        """The call that went wrong."""

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - the answer of any call
        """Do the call, or let it go wrong."""
        self.calls.append(name)
        if len(self.calls) - 1 != self._number:
            return call()
        self.struck = name
        return go_wrong(name, call, self._fault)


FAULTS: Final[dict[str, tuple[bool, type[BaseException]]]] = {
    "refused": (False, KeyStoreUnavailableError),
    "answer lost": (True, KeyStoreUnavailableError),
    "killed before": (False, KilledError),
    "killed after": (True, KilledError),
}
"""What can become of a call: whether it takes effect, and what its caller sees; of the store, `StoreUnavailableError`
in place of Vault's.
"""


def go_wrong(name: str, call: Callable[[], Any], fault: str) -> NoReturn:
    """Let a call go wrong in one of the ways of `FAULTS`."""
    done, error = FAULTS[fault]
    if done:
        call()
    if error is KeyStoreUnavailableError and name.startswith("store."):
        error = StoreUnavailableError
    msg = f"{name} is made to go wrong: {fault}"
    raise error(msg)
