"""What the rotation driver tells of itself, to logs and metrics and to whoever asks for the state of the keyring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from carnet_broker.core.keyring import Gate, Keyring, KeyringRegressionError, Step, Wait
from carnet_broker.core.mirror import MirrorNotBelievedError
from carnet_broker.core.rollout import Permit, VerifierSession
from carnet_broker.ports import KeyLostError

__all__ = ["RotationEvents", "RotationProgress"]


class RotationEvents(Protocol):
    """Who wants to hear what the driver does: logs and metrics."""

    def step_taken(self, step: Step, keyring: Keyring) -> None:
        """Tell that `step` was written, and `keyring` is the result."""

    def adopted(self, keyring: Keyring) -> None:
        """Tell that `keyring` is in force here."""

    def key_lost(self, kid: str, error: KeyLostError) -> None:
        """Tell that the private key of `kid` cannot be used any more; once for each finding, not at each look."""

    def permitted(self, permit: Permit, left_behind: Sequence[VerifierSession]) -> None:
        """Tell that a key may become the signer, and which live verifiers had not acknowledged it at its deadline."""

    def waits(self, progress: RotationProgress) -> None:
        """Tell what the keyring waits for; at the end of each round."""

    def regressed(self, error: KeyringRegressionError) -> None:
        """Tell that a keyring was refused that is older than what was in force, or forgets a revocation: an alarm."""

    def mirror_refused(self, error: MirrorNotBelievedError) -> None:
        """Tell that the mirror claims to be later than all that is known here, and is not signed by it: an alarm."""


@dataclass(frozen=True, slots=True)
class RotationProgress:
    """How the last round left the keyring."""

    keyring: Keyring
    wait: Wait | None
    """What it waits for; None where the round ended with steps to be taken."""
    gate: Gate | None
    """What the shared store said of the STANDBY key, None where it did not answer."""
    laggards: tuple[VerifierSession, ...] = ()
    """The live verifiers that had not acknowledged the STANDBY key, when its rotation was due and they were asked."""
