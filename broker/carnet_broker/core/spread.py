"""How far a revocation has spread: which live verifiers have loaded it, and how fast. Pure.

Rules
-----
1. Asked of are the verifiers that are live (`core.rollout`). One that left, or that was silent for its `max_staleness`,
   refuses all tokens by its own rule, and needs to know nothing.
2. A verifier has loaded a version when it has acknowledged that one or a later one.
3. The time is from durable to acknowledged. Of a verifier that came after the revocation there is none: it had it from
   its first moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from carnet_broker.core.rollout import VerifierSession

__all__ = ["Spread", "delay_by_store", "laggards_first", "spread_of"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Who has loaded one version of the revocations."""

    live: int
    missing: tuple[VerifierSession, ...]
    delays: tuple[timedelta, ...]
    """From durable to acknowledged, where that is known, the shortest first."""

    @property
    def acknowledged(self) -> int:
        """How many live verifiers have loaded it."""
        return self.live - len(self.missing)

    def percentile(self, share: int) -> timedelta | None:
        """Return the delay that `share` of 100 were not slower than (nearest rank), None where none is known."""
        if not self.delays:
            return None
        rank = -(-share * len(self.delays) // 100)
        return self.delays[max(rank, 1) - 1]


def spread_of(
    live: Sequence[VerifierSession],
    version: int,
    *,
    heard: Callable[[VerifierSession], int],
    delay: Callable[[VerifierSession], timedelta | None],
) -> Spread:
    """Return the spread of `version` over the verifiers that are `live`.

    `heard` is the version that a verifier is known to have acknowledged otherwise, 0 for none. `delay` is its time from
    durable to acknowledged, None where that is not known.
    """
    has = [session for session in live if max(session.revocation_version, heard(session)) >= version]
    named = {(session.spiffe_id, session.instance_id) for session in has}
    missing = tuple(session for session in live if (session.spiffe_id, session.instance_id) not in named)
    delays = [found for session in has if (found := delay(session)) is not None]
    return Spread(len(live), missing, tuple(sorted(delays)))


def delay_by_store(session: VerifierSession, durable_at: datetime) -> timedelta | None:
    """Return the time from `durable_at` to the acknowledgement that the store knows of, at most; None for none.

    The store knows when the newest version was acknowledged. Both times are one where the verifier came at that moment.
    """
    came_later = session.revocation_at == session.generation_at and session.generation_at > durable_at
    return None if came_later else max(session.revocation_at - durable_at, timedelta(0))


def laggards_first(live: Sequence[VerifierSession], generation: int) -> list[tuple[VerifierSession, bool]]:
    """Return the verifiers with whether each lags: those first, then by what they have loaded and by name.

    One lags that has not loaded `generation`, or that a rotation went on without and that has loaded no later one.
    """
    told = [(session, session.lagging or session.generation < generation) for session in live]
    return sorted(
        told,
        key=lambda entry: (
            not entry[1],
            entry[0].generation,
            entry[0].revocation_version,
            entry[0].spiffe_id,
            entry[0].instance_id,
        ),
    )
