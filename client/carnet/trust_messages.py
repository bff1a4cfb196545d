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
"""Revocations in one change."""

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
    """Puts together a change that comes in parts (rule 5 of `carnet.trust_state`). One for each stream or answer."""

    def __init__(self) -> None:
        self._first: tuple[Response, Moment] | None = None
        self._keys: PushedKeys | None = None
        self._entries: list[Revocation] = []

    def add(self, response: Response, asked_at: Moment) -> tuple[Response, Moment] | None:
        """Return the whole response and the moment that it is as fresh as, None while parts are missing.

        Raises `RefusedResponseError` where the parts do not belong together; then begins anew.
        """
        change = response.change
        if change is None or (self._first is None and not change.more):
            return response, asked_at
        if self._first is None:
            self._first = response, asked_at
        first, first_asked_at = self._first
        self._keys = response.keys or self._keys
        self._entries.extend(change.entries)
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

    def _reset(self) -> None:
        self._first, self._keys, self._entries = None, None, []
