"""A fleet of verifiers and trust processes, as events in time. No clock, no I/O: seeded, so that a run repeats itself.

Rules
-----
1. A process does one thing at a time, in the order in which things come up (one event loop under one interpreter lock).
   What it does takes processor time: opening a stream, a heartbeat, a push. A part of that passes before the message is
   out (`send_share`), the rest when its answer comes.
2. A stream is told when there is something newer than what it was told, of all that is new by then, in one delta. What
   comes while it waits for its turn joins that delta. Each verifier is told each change once.
3. Every response is answered. A heartbeat is due a random time after the last response: 0.8 to 1 of the period.
4. A process that dies takes its streams with it. Each verifier notices at once, waits a random time of up to half a
   second, and connects to one of the others. A stream also ends when its connection reaches its age.
5. An answer that says something new is a row in the store: a join, a generation or a revocation. A heartbeat is none.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

__all__ = ["Costs", "Fleet", "Run", "percentile"]

JITTER: Final = 0.2
FIRST_WAIT: Final = 0.5
NOTICE: Final = 0.01
"""Seconds from durable in the store to known in a process that is told of it: a notification and one reading."""
THERE_AND_BACK: Final = 0.001


@dataclass(frozen=True, slots=True)
class Costs:
    """What things cost a process, in seconds of processor time."""

    heartbeat: float
    push: float
    opening: float
    send_share: float
    """The part of `heartbeat` and `push` that passes before the message is out."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many there are of what, and how they are set up."""

    verifiers: int
    processes: int
    heartbeat: float = 15.0
    connection_age: float = 1800.0


class _Kind(IntEnum):
    CHANGE = 0
    """A process learns of a change."""
    SEND = 1
    """A stream has its turn."""
    ANSWER = 2
    BEAT = 3
    OPEN = 4
    DEATH = 5
    TOLD = 6


@dataclass
class _Stream:
    process: int
    told: int = 0
    """The last change that it was told of."""
    waits: bool = False
    beats_at: float = 0.0
    life: int = 0
    """Grows with each connection: what belongs to an older one is void."""
    opened: bool = True


@dataclass
class _Process:
    streams: set[int] = field(default_factory=set)
    idle: dict[int, None] = field(default_factory=dict)
    """Streams that do not wait for their turn, in a fixed order."""
    newest: int = 0
    free_at: float = 0.0
    busy: float = 0.0
    is_up: bool = True


class Run:
    """One run. What came of it is in its attributes."""

    def __init__(self, fleet: Fleet, costs: Costs, *, seed: int = 1) -> None:
        self.fleet = fleet
        self.costs = costs
        self.messages: Counter[str] = Counter()
        """By kind: heartbeat, push, hello (each with its first response), answer."""
        self.deltas: Counter[int] = Counter()
        """How many changes were told of in one push: how often."""
        self.rows = 0
        """Rows written in the store."""
        self.told_at: dict[int, list[float]] = {}
        """For each change, when verifiers were told, after it was durable."""
        self.answered_at: list[float] = []
        """When each push was answered, of the last change."""
        self.back_after: list[float] = []
        """For verifiers whose process died: how long they had no stream."""
        self.longest_queue = 0.0
        """Seconds that something had to wait for its turn."""
        self._random = random.Random(seed)  # noqa: S311 - a model
        self._events: list[tuple[float, int, _Kind, int, int]] = []
        self._count = 0
        self._durable_at: dict[int, float] = {}
        self._died_at = 0.0
        self._processes = [_Process() for _ in range(fleet.processes)]
        self._streams = [_Stream(number % fleet.processes) for number in range(fleet.verifiers)]
        for number, stream in enumerate(self._streams):
            process = self._processes[stream.process]
            process.streams.add(number)
            process.idle[number] = None
            stream.beats_at = self._random.uniform(0, fleet.heartbeat)
            self._at(stream.beats_at, _Kind.BEAT, number, 0)
            self._at(self._random.uniform(0, fleet.connection_age), _Kind.OPEN, number, 0)

    def change_at(self, moment: float) -> None:
        """Something changes: a generation, or a revocation."""
        version = len(self._durable_at) + 1
        self._durable_at[version] = moment
        self.told_at[version] = []
        for process in range(self.fleet.processes):
            self._at(moment + NOTICE, _Kind.CHANGE, process, version)

    def death_at(self, moment: float) -> None:
        """The first process dies."""
        self._at(moment, _Kind.DEATH, 0, 0)

    def until(self, end: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= end:
            moment, _, kind, number, detail = heapq.heappop(self._events)
            if kind is _Kind.CHANGE:
                self._change(moment, self._processes[number], detail)
            elif kind is _Kind.DEATH:
                self._death(moment)
            elif self._streams[number].life == detail:
                self._happen(moment, kind, number)

    def share(self, seconds: float) -> list[float]:
        """Return for each process which part of `seconds` it was at work."""
        return [process.busy / seconds for process in self._processes]

    def outstanding(self) -> Iterator[int]:
        """Return verifiers that were not told of the last change."""
        last = len(self._durable_at)
        return (number for number, stream in enumerate(self._streams) if stream.told != last)

    def _at(self, moment: float, kind: _Kind, number: int, detail: int) -> None:
        self._count += 1
        heapq.heappush(self._events, (moment, self._count, kind, number, detail))

    def _work(self, process: _Process, moment: float, cost: float) -> tuple[float, float]:
        """Take a turn; return when it begins and when it ends."""
        begins = max(moment, process.free_at)
        self.longest_queue = max(self.longest_queue, begins - moment)
        process.free_at = begins + cost
        process.busy += cost
        return begins, process.free_at

    def _happen(self, moment: float, kind: _Kind, number: int) -> None:
        stream = self._streams[number]
        process = self._processes[stream.process]
        if kind is _Kind.BEAT:
            self._beat(moment, number, stream, process)
        elif kind is _Kind.SEND:
            self._send(moment, number, stream, process)
        elif kind is _Kind.OPEN:
            self._open(moment, number, stream)
        elif kind is _Kind.ANSWER:
            self.messages["answer"] += 1
            self._work(process, moment, self.costs.heartbeat * (1 - self.costs.send_share))
        else:
            self._told(moment, stream, process)

    def _beat(self, moment: float, number: int, stream: _Stream, process: _Process) -> None:
        if stream.beats_at > moment or stream.waits:
            self._at(max(stream.beats_at, moment + JITTER), _Kind.BEAT, number, stream.life)
            return
        _, ends = self._work(process, moment, self.costs.heartbeat * self.costs.send_share)
        self.messages["heartbeat"] += 1
        self._at(ends + THERE_AND_BACK, _Kind.ANSWER, number, stream.life)
        stream.beats_at = ends + self._period()
        self._at(stream.beats_at, _Kind.BEAT, number, stream.life)

    def _change(self, moment: float, process: _Process, version: int) -> None:
        if not process.is_up:
            return
        process.newest = version
        waiting = [number for number in process.idle if self._streams[number].told < version]
        for number in waiting:
            del process.idle[number]
            self._wait(moment, number, process)

    def _wait(self, moment: float, number: int, process: _Process) -> None:
        stream = self._streams[number]
        stream.waits = True
        begins, _ = self._work(process, moment, self.costs.push * self.costs.send_share)
        self._at(begins, _Kind.SEND, number, stream.life)

    def _send(self, moment: float, number: int, stream: _Stream, process: _Process) -> None:
        """It is its turn: it is told of all that is new by now."""
        out = moment + self.costs.push * self.costs.send_share
        self._tell(out, stream, process.newest)
        self.messages["push"] += 1
        stream.waits = False
        stream.beats_at = out + self._period()
        process.idle[number] = None
        self._at(out + THERE_AND_BACK, _Kind.TOLD, number, stream.life)

    def _tell(self, out: float, stream: _Stream, newest: int) -> None:
        if newest == stream.told:
            return
        self.deltas[newest - stream.told] += 1
        for version in range(stream.told + 1, newest + 1):
            self.told_at[version].append(out - self._durable_at[version])
        stream.told = newest

    def _told(self, moment: float, stream: _Stream, process: _Process) -> None:
        """An answer that is news."""
        self.messages["answer"] += 1
        self.rows += 1
        _, ends = self._work(process, moment, self.costs.push * (1 - self.costs.send_share))
        if stream.told == len(self._durable_at):
            self.answered_at.append(ends - self._durable_at[stream.told])

    def _death(self, moment: float) -> None:
        died = self._processes[0]
        died.is_up = False
        self._died_at = moment
        for number in sorted(died.streams):
            stream = self._streams[number]
            stream.life += 1
            stream.opened, stream.waits = False, False
            self._at(moment + self._random.uniform(0, FIRST_WAIT), _Kind.OPEN, number, stream.life)
        died.streams.clear()
        died.idle.clear()

    def _open(self, moment: float, number: int, stream: _Stream) -> None:
        """Connect to some process, and be told what is new there."""
        was = stream.opened
        self._processes[stream.process].streams.discard(number)
        self._processes[stream.process].idle.pop(number, None)
        stream.process = self._random.choice([at for at, each in enumerate(self._processes) if each.is_up])
        process = self._processes[stream.process]
        stream.life += 1
        stream.opened, stream.waits = True, False
        _, ends = self._work(process, moment, self.costs.opening)
        self.messages["hello"] += 1
        self.messages["answer"] += 2  # To the first response, and to the one that says whether it is waited for.
        self.rows += 1
        process.streams.add(number)
        process.idle[number] = None
        self._tell(ends, stream, process.newest)
        if not was:
            self.back_after.append(ends - self._died_at)
        stream.beats_at = ends + self._period()
        self._at(stream.beats_at, _Kind.BEAT, number, stream.life)
        self._at(ends + self.fleet.connection_age, _Kind.OPEN, number, stream.life)

    def _period(self) -> float:
        return self.fleet.heartbeat * self._random.uniform(1 - JITTER, 1)


def percentile(values: list[float], percent: float) -> float:
    """Return the value that `percent` of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
