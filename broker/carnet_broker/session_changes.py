"""What verifiers have said and the store has not heard yet: bounded, however long the store is away.

Rules
-----
1. Of one verifier only what is not outdone is kept: the newest `Joined`, the newest acknowledgement of a stream, and
   that streams have ended, the newest `ENDED_STREAMS` of them. A `Joined` of a stream that has ended, or that a newer
   stream follows, is told that it is not counted.
2. Verifiers that the store has not heard of join up to `VERIFIERS` of them. The others are told that they are not
   counted, and may try again: nobody relies on a verifier before it is told that it is.
3. Each verifier's changes stay in their order, also those that could not be written.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final, Protocol

from carnet_broker.ports import Acknowledged, Joined, Left, SessionChange, SessionOutcome

__all__ = ["BATCHES", "ENDED_STREAMS", "VERIFIERS", "Report", "Said", "SessionChanges"]

ENDED_STREAMS: Final = 8
"""Streams of one verifier of which the store is told that they have ended."""
VERIFIERS: Final = 20_000
"""More than a broker serves at the same time."""
BATCHES: Final = 4
"""Taken out in one round."""
_NOT_COUNTED: Final = SessionOutcome(live=False)


class Report(Protocol):
    """What takes changes of sessions to the store: `told` hears in any thread what became of one.

    `soon`: whether somebody waits for it.
    """

    def __call__(
        self, change: SessionChange, told: Callable[[SessionOutcome], None] | None = None, *, soon: bool = True
    ) -> None:
        """Take `change`."""


@dataclass(frozen=True, slots=True)
class Said:
    """A change of a session that is not written yet."""

    change: SessionChange
    mono: float
    """When it was said, in monotonic seconds."""
    told: Callable[[SessionOutcome], None] | None

    def aged(self, mono: float) -> SessionChange:
        """Return the change as it is to be written at `mono`."""
        if isinstance(self.change, Acknowledged):
            return replace(self.change, ago=timedelta(seconds=max(mono - self.mono, 0.0)))
        return self.change

    def tell(self, outcome: SessionOutcome) -> None:
        """Tell whoever said it what became of it."""
        if self.told is not None:
            self.told(outcome)


class SessionChanges:
    """Changes by verifier. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[tuple[str, str], list[Said]] = {}

    def add(self, said: Said) -> None:
        """Keep `said` until it is taken, and drop what it outdoes."""
        with self._lock:
            key = _key(said.change)
            if isinstance(said.change, Joined) and key not in self._of and len(self._of) >= VERIFIERS:
                outdone = [said]
            else:
                outdone = _append(self._of.setdefault(key, []), said)
        _tell_outdone(outdone)

    def __len__(self) -> int:
        """Return how many verifiers have something that is not taken."""
        return len(self._of)

    def batches(self, count: int, *, everything: bool) -> Iterator[list[Said]]:
        """Take out some batches of `count`, or all there are: what else there is to do in a round has its turn."""
        for _ in itertools.count() if everything else range(BATCHES):
            batch = self.take(count)
            if not batch:
                return
            yield batch

    def take(self, count: int) -> list[Said]:
        """Take out `count` changes, or some more: all of a verifier are taken together."""
        taken: list[Said] = []
        with self._lock:
            while self._of and len(taken) < count:
                taken += self._of.pop(next(iter(self._of)))
        return taken

    def put_back(self, taken: Sequence[Said]) -> None:
        """Put back what could not be written, before what was said since."""
        outdone: list[Said] = []
        with self._lock:
            since, self._of = self._of, {}
            for said in (*taken, *(said for later in since.values() for said in later)):
                outdone += _append(self._of.setdefault(_key(said.change), []), said)
        _tell_outdone(outdone)


def _append(own: list[Said], said: Said) -> list[Said]:
    """Append `said` to what its verifier has said; take out and return what it outdoes (rule 1)."""
    new = said.change
    if isinstance(new, Joined):
        outdone = [one for one in own if not isinstance(one.change, Left)]
    else:
        outdone = [one for one in own if one.change.stream == new.stream and not _is_before(one.change, new)]
    own[:] = [one for one in own if one not in outdone]
    own.append(said)
    ended = [one for one in own if isinstance(one.change, Left)]
    for oldest in ended[:-ENDED_STREAMS]:
        own.remove(oldest)
    return outdone


def _is_before(earlier: SessionChange, later: Acknowledged | Left) -> bool:
    """Say whether `earlier` has to be written before `later`, of the same stream."""
    return isinstance(earlier, Joined) and isinstance(later, Acknowledged)


def _tell_outdone(outdone: Sequence[Said]) -> None:
    for said in outdone:
        said.tell(_NOT_COUNTED)


def _key(change: SessionChange) -> tuple[str, str]:
    named = change.session if isinstance(change, Joined) else change
    return named.spiffe_id, named.instance_id
