"""Who has to have loaded a key before it may sign: the live verifiers and the live replicas. Pure.

Rules
-----
1. A verifier is live from its admission until it says goodbye, or until its own `max_staleness` after its last answer:
   then by its own rule it refuses all tokens, and can refuse no good one wrongly. While the replica that serves it is
   live, that replica watches over this, and takes the session out. When the replica's lease ends, its sessions stay
   live for `max_staleness` longer.
2. A verifier that polls, or that accepts what is stale, is never live: the window for pollers is there for it.
3. Before a STANDBY key is published as generation g, `rollout` is raised to (g, kid). A verifier is admitted only with
   a generation that is not lower than the rollout's. Both happen under one lock: so whoever is not counted for g has g.
4. A permit for (g, kid) is given, under the same lock, when every live verifier that does not lag has acknowledged g;
   or when the deadline is over: then those that have not are marked as lagging. No key becomes ACTIVE without it.
5. One that lags holds up no later rotation until it acknowledges the newest generation; from then on it counts again.
6. A replica is live until its lease ends. The window for pollers begins when the last live replica has loaded g.
7. A store that was restored has forgotten sessions. Whoever was counted there, and is not counted again, is stale by
   its own rule once its `max_staleness` has passed; so there is no new permit before that, for `RECOUNT_AT_MOST`. And
   there is none for a broker that knows of a lease which the store has not: it was restored, and nobody has found out
   yet. A verifier alone can cause one recount in `RECOUNT_AGAIN_AFTER`: it may lie about what it has loaded, and must
   not keep the keys from rotating.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

__all__ = [
    "RECOUNT_FOR",
    "Permit",
    "ReplicaLease",
    "RolloutState",
    "VerifierSession",
    "has_forgotten",
    "laggards",
    "live_sessions",
    "recount_ends",
    "recounts_for_a_claim",
    "served_since",
]

RECOUNT_FOR: Final = timedelta(minutes=5)
"""The `max_staleness` that verifiers have by default: a session that was forgotten tells nothing of its own."""

RECOUNT_AT_MOST: Final = timedelta(minutes=15)
"""A verifier says itself how patient it is. One that says more is not waited for when its session was forgotten."""

RECOUNT_AGAIN_AFTER: Final = timedelta(hours=1)
"""What a broker finds out by itself, from its own lease, is not bound by this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLease:
    """One broker process, as the store knows it. Times are the store's, aware UTC."""

    replica_id: str
    version: str
    """Of the software."""
    generation: int
    """Of the keyring that it serves."""
    generation_at: datetime
    """Since when it serves that one."""
    revocation_version: int
    renewed_at: datetime
    lease: timedelta

    @property
    def ends_at(self) -> datetime:
        """When the lease ends unless it is renewed."""
        return self.renewed_at + self.lease

    def is_live(self, now: datetime) -> bool:
        """Say whether the lease has not ended."""
        return now < self.ends_at


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierSession:
    """One verifier, as the store knows it. Times are the store's, aware UTC."""

    spiffe_id: str
    instance_id: str
    """Tells verifiers of one SPIFFE ID apart."""
    audience: str
    replica_id: str
    """The broker that serves it."""
    generation: int
    """The newest generation that it has acknowledged."""
    generation_at: datetime
    revocation_version: int
    """The newest revocation that it has acknowledged."""
    revocation_at: datetime
    max_staleness: timedelta
    polls: bool = False
    """True for one that goes on with what is stale: no rotation waits for it."""
    lagging: bool = False
    """True when a rotation went on without it (rule 5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Permit:
    """The leave for one key to become the signer."""

    generation: int
    """The generation in which the key was published."""
    kid: str
    given_at: datetime
    overdue: bool
    """True when the deadline was over, and some verifiers had not acknowledged."""
    repeated: bool = field(default=False, compare=False)
    """True when it was given before, perhaps to another broker: then it is no news."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutState:
    """The rollout row of the store."""

    generation: int
    """0 before the first."""
    kid: str
    raised_at: datetime | None
    permit: Permit | None
    """The permit for just this generation and key, None while there is none."""


def live_sessions(
    sessions: Iterable[VerifierSession], replicas: Mapping[str, ReplicaLease], now: datetime
) -> list[VerifierSession]:
    """Return the sessions that are live at `now` (rules 1 and 2). `replicas` by id."""
    live = []
    for session in sessions:
        replica = replicas.get(session.replica_id)
        if session.polls or replica is None:
            continue
        if replica.is_live(now) or now < replica.ends_at + session.max_staleness:
            live.append(session)
    return live


def laggards(live: Iterable[VerifierSession], generation: int) -> list[VerifierSession]:
    """Return those among `live` that a permit for `generation` waits for (rules 4 and 5)."""
    return [session for session in live if session.generation < generation and not session.lagging]


def served_since(replicas: Iterable[ReplicaLease], generation: int, now: datetime) -> datetime | None:
    """Return since when every live replica serves `generation` or a later one; None while one does not (rule 6)."""
    live = [replica for replica in replicas if replica.is_live(now)]
    if not live or any(replica.generation < generation for replica in live):
        return None
    return max(replica.generation_at for replica in live)


def has_forgotten(replicas: Mapping[str, ReplicaLease], seen: Iterable[ReplicaLease]) -> bool:
    """Say whether the store lacks a renewal among those `seen` in it before. `replicas` by id, as they are now."""
    return any(
        lease.replica_id not in replicas or replicas[lease.replica_id].renewed_at < lease.renewed_at for lease in seen
    )


def recount_ends(
    restored_at: datetime, sessions: Iterable[VerifierSession], replicas: Iterable[ReplicaLease]
) -> datetime:
    """Return from when the sessions can be relied on again after the store was found restored (rule 7)."""
    longest = max((session.max_staleness for session in sessions if not session.polls), default=RECOUNT_FOR)
    lease = max((replica.lease for replica in replicas), default=timedelta(0))
    return restored_at + min(max(longest, RECOUNT_FOR), RECOUNT_AT_MOST) + lease


def recounts_for_a_claim(restored_at: datetime | None, now: datetime) -> bool:
    """Say whether an epoch that begins now, perhaps on the word of a verifier alone, begins a recount too (rule 7)."""
    return restored_at is None or now >= restored_at + RECOUNT_AGAIN_AFTER
