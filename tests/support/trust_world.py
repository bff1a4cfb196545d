"""A small world of brokers and verifiers around one Vault and one store, in which the real code runs.

Of the brokers the rotation driver, the loop of the store, and the trust streams (`edges.grpc.watch`); of the verifiers
all that decides (`carnet.trust_state`, `carnet.watch_protocol`, `carnet.revocations`). Made up are the clocks, the
network, and Vault and store, which pass the contract suites of the real ones. Time stands until it is moved.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta

from carnet.revocations import Revocation
from carnet_broker.core.keyring import Keyring
from carnet_broker.core.keyring_document import keyring_of_content
from support.fakes import FakeKeyringDocument, FakeRotationRequests
from support.keyrings import ISSUER, SECOND
from support.store_fakes import FakeStoreData
from support.trust_broker import Broker
from support.trust_parts import (
    CERTIFICATES,
    SUBJECTS,
    Clock,
    NumberedKeyStore,
    Token,
    VirtualLoop,
)
from support.trust_poller import Poller
from support.trust_verifier import Verifier

__all__ = ["TrustWorld"]


class TrustWorld:
    """All of it, and what is true whoever knows it."""

    def __init__(self, *, brokers: int, verifiers: int, pollers: int = 0, skews: tuple[int, ...] = (0,)) -> None:
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
        self.verifiers: list[Verifier] = [
            (Verifier if number < verifiers else Poller)(self, number, self.skews[number % len(skews)])
            for number in range(verifiers + pollers)
        ]

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
                if not verifier.suspended:
                    at = (verifier.number + turn) % len(self.brokers)
                    verifier.go_on([*self.brokers[at:], *self.brokers[:at]])
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
