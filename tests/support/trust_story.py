"""What stories of the world of `support.trust_world` begin with, and are told with."""

from __future__ import annotations

import random

from carnet_broker.ports import RequestKind
from support.trust_judge import Judge
from support.trust_parts import TIMING
from support.trust_verifier import Verifier
from support.trust_world import TrustWorld

__all__ = ["WARM", "WINDOW", "Story"]

WARM = 40
"""Seconds after which CI may ask for a rotation."""
WINDOW = int(TIMING.poller_window.total_seconds())


class Story:
    """A world that has run for a while, with two brokers and as many verifiers."""

    def __init__(self) -> None:
        random.seed(0)
        self.world = TrustWorld(brokers=2, verifiers=2)
        self.judge = Judge(self.world)
        self.run(WARM)
        self.one, self.other = self.world.verifiers

    def run(self, seconds: int) -> None:
        """Let all go on, and look at each step."""
        self.world.run(seconds, check=self.look)

    def look(self) -> None:
        """Have each broker issue a token, and show all to all."""
        for number in range(len(self.world.brokers)):
            self.world.issue(number)
        self.judge.look()

    def ask(self) -> None:
        """CI asks for a rotation."""
        self.world.requests.submit(RequestKind.ROTATE, created_at=self.world.data.now())

    def cut_off(self, verifier: Verifier, *, mend: bool = False) -> None:
        """Cut a verifier off from all brokers, or bring it back."""
        links = {(verifier.number, broker.replica_id) for broker in self.world.brokers}
        self.world.cut = self.world.cut - links if mend else self.world.cut | links

    @property
    def signer(self) -> str:
        """The key that signs."""
        active = self.world.keyring().active
        assert active is not None
        return active.kid

    def verdicts(self) -> list[str]:
        """What each verifier says of a new token."""
        token = self.world.issue(0)
        assert token is not None
        return [verifier.judge(token) for verifier in self.world.verifiers]
