"""The ports to the shared store: what all brokers of an environment know together.

One database behind all of them: SQLite for one host, PostgreSQL for more. Each call is one transaction, and may raise
`StoreUnavailableError`. Times in the answers are the store's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from carnet.errors import CarnetError
from carnet.revocations import Revocation, RevocationKind
from carnet_broker.core.mirror import MirrorSignature
from carnet_broker.core.rollout import Permit, ReplicaLease, RolloutState, VerifierSession

__all__ = [
    "Acknowledged",
    "Appended",
    "Joined",
    "KeyringMirror",
    "Left",
    "LogPosition",
    "MirroredKeyring",
    "NewRevocation",
    "ReplicaLeases",
    "ReplicaReport",
    "ReplicasSeen",
    "RevocationLog",
    "RevocationPage",
    "Rollout",
    "SessionChange",
    "SessionOutcome",
    "StoreUnavailableError",
    "VerifierSessions",
    "WaitingFor",
    "Wakeups",
]


class StoreUnavailableError(CarnetError):
    """The shared store cannot be used now: down, slow, refusing, or its answer makes no sense."""

    code = "STORE_UNAVAILABLE"
    retryable = True


@dataclass(frozen=True, slots=True)
class LogPosition:
    """A place in the log of revocations. `digest` is the running hash up to `version`."""

    epoch: int
    version: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRevocation:
    """What is to be revoked. The store gives it its version."""

    kind: RevocationKind
    value: str
    expires_at: datetime | None
    """None for a BLOCK."""
    before_version: int | None = None
    """None: the version that the entry gets, for the kinds that look at `rv`. Given when an entry is carried over."""
    by: str = ""
    """The SPIFFE ID of whoever asked."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Appended:
    """What `RevocationLog.append` wrote. It is durable."""

    entries: tuple[Revocation, ...]
    position: LogPosition
    at: datetime
    standing: tuple[Revocation, ...] = ()
    """For each that was asked for the entry that is in force for it: one of `entries`, or one of before."""


@dataclass(frozen=True, slots=True)
class RevocationPage:
    """What `RevocationLog.read` found, all of one transaction."""

    position: LogPosition
    """Where `entries` lead to."""
    snapshot: bool
    """True when `entries` are all that is in force, False when they are what came after the position asked for."""
    entries: tuple[Revocation, ...]
    read_at: datetime


class RevocationLog(Protocol):
    """The revocations of all brokers, in one gap-free order."""

    def append(self, entries: Sequence[NewRevocation]) -> Appended:
        """Make `entries` durable, in their order, with the next versions; two calls never share or skip one.

        One that would change nothing, because an entry that is there lasts as long and reaches as far, is not written.
        """

    def read(self, after: LogPosition | None) -> RevocationPage:
        """Return what came after `after`: a snapshot for None, another epoch or digest, or where entries in between
        were cleaned up. Where the store is *behind* `after` in its epoch, the page says so by its lower position.
        """

    def begin_epoch(self, *, seen: LogPosition, carry: Sequence[Revocation], now: datetime) -> LogPosition:
        """Begin a new epoch, because the store is behind what was `seen` of it: it was restored from a backup.

        The epoch is higher than any seen, and versions go on far above the highest seen. The entries of `carry` that
        have not ended and that the store lacks are entered anew, with their own `before_version`. What names tokens by
        `rv`, and is not in `carry`, may have been entered since the restoration, with a version that was given before:
        it is entered anew for all tokens up to now. Verifiers are counted again from now on, before there is another
        permit. Does nothing, and returns the position as it is, where the store is no longer behind `seen`: somebody
        else was first.
        """


@dataclass(frozen=True, slots=True)
class Joined:
    """A verifier has loaded what it was given, and wants to be counted."""

    session: VerifierSession
    """Its times are ignored: the store sets them."""
    stream: str
    """Names this stream: what comes of an older stream of the same verifier is ignored."""


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A verifier has loaded a newer generation or revocation."""

    spiffe_id: str
    instance_id: str
    stream: str
    generation: int
    revocation_version: int
    ago: timedelta
    """How long before this call it said so."""


@dataclass(frozen=True, slots=True)
class Left:
    """A verifier said goodbye, or was silent for its `max_staleness`."""

    spiffe_id: str
    instance_id: str
    stream: str


SessionChange = Joined | Acknowledged | Left


@dataclass(frozen=True, slots=True)
class SessionOutcome:
    """What became of one change: for a `Joined`, whether the verifier is counted now."""

    live: bool
    required_generation: int = 0
    """When not live: the generation that it has to load first; 0 where its identity has too many sessions."""


class VerifierSessions(Protocol):
    """The verifiers that rotations wait for."""

    def write(self, changes: Sequence[SessionChange]) -> Sequence[SessionOutcome]:
        """Enter the changes, in their order; one outcome for each. Joins share-lock the rollout row (rule 3)."""

    def all(self) -> Sequence[VerifierSession]:
        """Return every session, live or not."""


@dataclass(frozen=True, slots=True)
class WaitingFor:
    """Why there is no permit yet."""

    laggards: tuple[VerifierSession, ...]


class Rollout(Protocol):
    """The gate between a published key and the signing one."""

    def raise_to(self, generation: int, kid: str) -> None:
        """Say that `kid` is about to be published as `generation`; it never goes down. Before the publication."""

    def permit(
        self, generation: int, kid: str, *, overdue: bool, seen: Sequence[ReplicaLease] = ()
    ) -> Permit | WaitingFor:
        """Give the permit if every live verifier that does not lag has acknowledged `generation`, counted under the
        exclusive lock of the rollout row; with `overdue` in any case, and those that have not are marked as lagging.
        Given once, it is given again.

        `seen` are the leases as the broker saw them last. A store that lacks one of these renewals was restored, and
        gives no permit; nor does one that was found restored, before the verifiers are counted again (rule 7).
        """

    def state(self) -> RolloutState:
        """Return the rollout row, and its permit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """What a broker tells of itself. The store sets the times."""

    replica_id: str
    version: str
    generation: int
    revocation_version: int
    lease: timedelta
    renewed_at: datetime | None = None
    """When the lease was renewed before, as the store told; None for the first time."""


@dataclass(frozen=True, slots=True)
class ReplicasSeen:
    """All replicas, and the store's clock."""

    now: datetime
    replicas: tuple[ReplicaLease, ...]
    restored: bool = False
    """Whether the store had forgotten the renewal before: it was restored from a backup."""


class ReplicaLeases(Protocol):
    """Which brokers are running."""

    def renew(self, report: ReplicaReport) -> ReplicasSeen:
        """Renew the lease. `generation_at` is kept while the generation is the same. Where the store has forgotten
        `report.renewed_at`, it was restored: from then on the verifiers are counted again.
        """

    def leave(self, replica_id: str) -> None:
        """End the lease now: a broker that drains is not waited for. Its sessions live on for their max_staleness."""

    def clean(self) -> int:
        """Delete what has ended in all tables: expired revocations and what outlived its use; say how many rows."""


@dataclass(frozen=True, slots=True)
class MirroredKeyring:
    """The keyring document as the store has it."""

    generation: int
    content: dict[str, Any]
    saved_at: datetime
    read_at: datetime
    signature: MirrorSignature | None = None
    """None where it was not signed. Not checked: the store has no keys."""


class KeyringMirror(Protocol):
    """The public keyring document, for brokers that cannot reach Vault."""

    def save(self, generation: int, content: dict[str, Any], signature: MirrorSignature | None) -> None:
        """Keep `content` with its `signature`, in place of what is there, unless a later generation is there."""

    def load(self) -> MirroredKeyring | None:
        """Return what was saved last, None where nothing was."""


class Wakeups(Protocol):
    """Tells that something in the store has changed. Only a hint: whoever waits looks at the store now and then too."""

    def wait(self, timeout: timedelta) -> bool:
        """Return True when something may have changed, False after `timeout`. Never raises for a lost connection."""

    def close(self) -> None:
        """End a `wait` that is under way, and let go of the connection."""
