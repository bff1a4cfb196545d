"""Verifiers whose stream has ended without a goodbye: counted until by their own rule they could accept nothing more.

Rules
-----
1. A verifier whose stream broke may be on its way to another broker, or cut off: it goes on verifying, and is counted,
   for its own `max_staleness` after its last answer. Then it leaves, unless a later stream of it has joined meanwhile:
   the store knows a verifier by its newest stream.
2. So of one verifier there is one ended stream at most that matters, and those that the store was not yet told of.
3. No verifier is forgotten before its time, whoever else connects: a rotation would not wait for it, and it would
   refuse good tokens. Where there are `per_identity` ended ones of an identity, further ones of that identity are told
   everything, and not counted, until some have left. They are named by nobody but a workload with that certificate: so
   one that reconnects again and again takes the count from itself, and neither the memory of the broker nor the count
   of anybody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from carnet_broker.ports import Left

__all__ = ["EndedStreams"]


class EndedStreams:
    """Keeps few bytes of each, and says when it is over. Lives on one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, leave: Callable[[Left], None], *, per_identity: int) -> None:
        """`leave` is called when a verifier is counted no longer."""
        self._loop = loop
        self._leave = leave
        self._per_identity = per_identity
        self._of: dict[str, dict[str, dict[int, tuple[str, asyncio.TimerHandle]]]] = {}
        """By identity, instance and the number of the stream: its name, and what ends it."""

    def __len__(self) -> int:
        return sum(len(ended) for instances in self._of.values() for ended in instances.values())

    def identities(self) -> list[str]:
        """Return those that have ended streams."""
        return list(self._of)

    def add(self, identity: str, instance: str, number: int, stream: str, *, seconds: float) -> None:
        """Have a verifier leave in that many seconds. `number` rises from stream to stream."""
        timer = self._loop.call_later(seconds, self._over, identity, instance, number)
        self._of.setdefault(identity, {}).setdefault(instance, {})[number] = stream, timer

    def admits(self, identity: str, instance: str) -> bool:
        """Say whether one more verifier of `identity` may be counted (rule 3)."""
        instances = self._of.get(identity, {})
        return instance in instances or len(instances) < self._per_identity

    def settled(self, identity: str, instance: str, number: int, *, joined: bool) -> None:
        """Take in what became of the join of a stream, which may have ended since (rules 1 and 2)."""
        for other in list(self._of.get(identity, {}).get(instance, {})):
            if (other < number) if joined else (other == number):
                self._drop(identity, instance, other)

    def leave_all(self, identity: str) -> None:
        """Have all verifiers of `identity` leave now."""
        for instance, ended in list(self._of.get(identity, {}).items()):
            for number in list(ended):
                self._over(identity, instance, number)

    def _over(self, identity: str, instance: str, number: int) -> None:
        self._leave(Left(identity, instance, self._drop(identity, instance, number)))

    def _drop(self, identity: str, instance: str, number: int) -> str:
        instances = self._of[identity]
        stream, timer = instances[instance].pop(number)
        timer.cancel()
        if not instances[instance]:
            del instances[instance]
        if not instances:
            del self._of[identity]
        return stream
