"""What brokers and verifiers say to each other about trust, as values. No clock, no I/O.

The wire is `protos/carnet/v1/trust.proto`; `carnet.trust_wire` reads and writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

from carnet.jwk import KeySet
from carnet.keysets import Moment
from carnet.revocations import Position, Revocation

__all__ = [
    "MAX_CHANGE_BYTES",
    "MAX_CHANGE_TIME",
    "MAX_ENTRIES",
    "Answer",
    "Change",
    "Goodbye",
    "Hello",
    "PartCollector",
    "PushedKeys",
    "RefusedResponseError",
    "Response",
]

MAX_ENTRIES: Final = 1_000_000
"""Revocations in one change. One of a token has about 40 bytes on the wire, so that this many have 40 MB."""
MAX_CHANGE_BYTES: Final = 256 * 1024 * 1024
"""Bytes of one change on the wire: `MAX_ENTRIES` of 268 bytes each, so that a store of long SPIFFE IDs fits too."""
MAX_CHANGE_TIME: Final = timedelta(minutes=2)
"""From the first part of a change to its last. What is at hand is old by then, and others may still be asked in time:
the default of `max_staleness` is five minutes."""

_NOTHING: Final = timedelta()


class RefusedResponseError(Exception):
    """A response that was not loaded: it does not follow from what is at hand, or cannot be."""

    def __init__(self, message: str, *, gap: bool = False) -> None:
        super().__init__(message)
        self.gap = gap
        """Whether a snapshot will do: the next Hello asks for one."""


@dataclass(frozen=True, slots=True)
class Change:
    """What leads from one version of the revocations to another; a `snapshot` is all that is in force."""

    from_version: int
    to_version: int
    to_digest: bytes
    snapshot: bool
    more: bool
    entries: tuple[Revocation, ...]


@dataclass(frozen=True, slots=True)
class PushedKeys:
    """A key set that came with a response."""

    issuer: str
    generation: int
    keys: KeySet
    max_age: timedelta


@dataclass(frozen=True, slots=True)
class Response:
    """One message of a broker."""

    position: Position
    age: timedelta
    answered: int = 0
    heartbeat: timedelta = _NOTHING
    keys: PushedKeys | None = None
    change: Change | None = None
    live: bool = False
    size: int = 0
    """Bytes on the wire."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a verifier. `position` is None where nothing is loaded, or all is asked for again."""

    instance_id: str
    audience: str
    position: Position | None
    max_staleness: timedelta
    accepts_stale: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What the verifier has loaded after a response. `position` is None where that is nothing yet."""

    number: int
    position: Position | None


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The last message of a verifier."""


class PartCollector:
    """Puts together a change that comes in parts (rule 5 of `carnet.trust_state`). One for each stream or answer.

    What is collected is bounded, in entries, bytes and time, and each part but the last must bring something: a broker
    that goes on for ever would hold the verifier, and its memory.
    """

    def __init__(self) -> None:
        self._first: tuple[Response, Moment] | None = None
        self._began: Moment | None = None
        self._keys: PushedKeys | None = None
        self._entries: list[Revocation] = []
        self._bytes = 0

    def add(self, response: Response, asked_at: Moment, now: Moment) -> tuple[Response, Moment] | None:
        """Return the whole response and the moment that it is as fresh as, None while parts are missing.

        Raises `RefusedResponseError` where the parts do not belong together, or are too many; then begins anew.
        """
        change = response.change
        if self._began is not None and now.since(self._began) > MAX_CHANGE_TIME:
            self._reset()
            msg = f"the change has not ended {MAX_CHANGE_TIME} after its first part"
            raise RefusedResponseError(msg)
        if change is None or (self._first is None and not change.more):
            return response, asked_at
        if self._first is None:
            self._first, self._began = (response, asked_at), now
        first, first_asked_at = self._first
        self._keys = response.keys or self._keys
        self._entries.extend(change.entries)
        self._bytes += response.size
        try:
            self._check_part(first, response)
        except RefusedResponseError:
            self._reset()
            raise
        if change.more:
            return None
        whole = replace(
            response,
            age=max(first.age, response.age),
            keys=self._keys,
            change=replace(change, entries=tuple(self._entries)),
        )
        self._reset()
        return whole, first_asked_at

    def _check_part(self, first: Response, part: Response) -> None:
        one, other = first.change, part.change
        assert one is not None  # noqa: S101 - for the type checker: only parts with a change are collected
        assert other is not None  # noqa: S101 - as above
        together = (one.from_version, one.snapshot, first.position.epoch)
        if together != (other.from_version, other.snapshot, part.position.epoch) or one.to_version > other.to_version:
            msg = "a part of a change is not of the change that began before"
            raise RefusedResponseError(msg)
        if len(self._entries) > MAX_ENTRIES:
            msg = f"the change has more than {MAX_ENTRIES} entries"
            raise RefusedResponseError(msg)
        if self._bytes > MAX_CHANGE_BYTES:
            msg = f"the change has more than {MAX_CHANGE_BYTES} bytes"
            raise RefusedResponseError(msg)
        if other.more and not other.entries:
            msg = "a part of a change has no entries, and says that more will come"
            raise RefusedResponseError(msg)

    def _reset(self) -> None:
        self._first, self._began, self._keys, self._entries, self._bytes = None, None, None, [], 0
