"""How often the proofs repeat themselves: the one table.

`make test` takes the quick counts, `make prove` (CARNET_COUNTS=full) the full ones. A proof asks for its count by name.
"""

from __future__ import annotations

import os
from typing import Final

__all__ = ["ALL", "TABLE", "count", "form"]

ALL: Final = -1
"""As many as there are."""

_FORMS: Final = ("quick", "full")

# The quick count of each, and the full one.
TABLE: Final[dict[str, tuple[int, int]]] = {
    # rotation
    "rotations_under_load": (20, 200),
    "acknowledged_rotations": (20, 1_000),
    "rotations_without_waiting": (1, 50),
    "keys_revoked_under_load": (3, 30),
    "keys_revoked_through_vault": (1, 30),
    "simultaneous_rotations": (10, 50),
    "kills_during_rotations": (5, 50),
    "keyring_machine": (80, 5_000),
    "rotation_machine": (30, 3_000),
    # revocation
    "revocations_under_load": (20, 500),
    "revocations_without_notify": (3, 50),
    "watch_streams": (100, 1_000),
    "revocations_to_streams": (3, 50),
    "trust_model": (25, 3_000),
    "entries_of_each_writer": (50, 200),
    "kills_while_revoking": (10, 100),
    "runs_of_kills_while_revoking": (1, 5),
    # the verifier
    "differential": (2_000, 100_000),
    "let_through": (1_000, 10_000),
    "any_input": (200, 20_000),
    "any_parts": (200, 20_000),
    "any_claim": (300, 20_000),
    "round_trip": (200, 20_000),
    "binding": (200, 20_000),
    "times": (200, 20_000),
    "single_substitutions": (6000, ALL),
    "single_insertions": (6000, ALL),
    # TLS
    "handshakes_in_a_burst": (300, 3_000),
    "seconds_of_storm": (8, 90),
    "trust_state": (300, 20_000),
    # sizes
    "tokens_with_an_unknown_key": (20_000, 100_000),
    "grants_in_one_policy": (20_000, 100_000),
}


def form() -> str:
    """Return which counts are in force: ``quick``, or ``full`` where CARNET_COUNTS says so."""
    wanted = os.environ.get("CARNET_COUNTS", "quick")
    if wanted not in _FORMS:
        msg = f"CARNET_COUNTS is {wanted!r}: set it to 'quick' or 'full', or leave it out for 'quick'"
        raise ValueError(msg)
    return wanted


def count(name: str, *, of: int | None = None) -> int:
    """Return how often the proof `name` is to repeat itself; `of` is how many there are, for those that take all."""
    number = TABLE[name][_FORMS.index(form())]
    if number != ALL:
        return number
    if of is None:
        msg = f"the count of {name} is all of them: say how many there are"
        raise ValueError(msg)
    return of
