"""The durations that the rotation of keys rests on, and how they hold together."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

__all__ = ["Timing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The durations that rotation rests on. Defaults are for production; tests use small ones."""

    max_age: timedelta = timedelta(minutes=5)
    """For how long a verifier may use a key set before it fetches it again; served with every set."""
    poller_interval: timedelta = timedelta(minutes=10)
    """The longest pause of verifiers that poll by a clock of their own and ignore the max-age. 0: there are none."""
    replica_lag: timedelta = timedelta(seconds=15)
    """The longest time that a replica needs to serve a document after it was written."""
    skew: timedelta = timedelta(seconds=5)
    """How far two clocks may be apart."""
    leeway: timedelta = timedelta(seconds=30)
    """What verifiers allow on `nbf` and `iat`."""
    longest_life: timedelta = timedelta(hours=1)
    """No token lives longer than this, whatever the policy says."""
    island: timedelta = timedelta(minutes=15)
    """How long a replica that nobody can reach may go on signing."""
    sign_for: timedelta = timedelta(days=7)
    """For how long a key may sign after its activation."""
    rotate_every: timedelta = timedelta(days=1)
    """The age at which the ACTIVE key is replaced with no request."""
    min_interval: timedelta = timedelta(minutes=10)
    """The shortest time between two rotations that CI asked for."""
    acknowledge_within: timedelta = timedelta(minutes=15)
    """How long a rotation that is due waits for verifiers that have not loaded the key."""

    def __post_init__(self) -> None:
        """Refuse durations that contradict each other, with `ValueError`."""
        if self.rotate_every + self.poller_window + self.acknowledge_within >= self.sign_for:
            needed = "rotate_every + max_age + poller_interval + skew + acknowledge_within"
            msg = f"sign_for must be longer than {needed}: the key would end before the next one signs"
            raise ValueError(msg)
        if self.island > self.sign_for:
            msg = "island must not be longer than sign_for"
            raise ValueError(msg)

    @property
    def poller_window(self) -> timedelta:
        """How long after every replica serves a key the slowest verifier has it."""
        return self.max_age + self.poller_interval + self.skew

    @property
    def keep_retired(self) -> timedelta:
        """How long a RETIRED key stays published after its successor's activation."""
        return self.island + self.longest_life + self.leeway + self.skew
