"""How often the proofs repeat themselves: few times in `make test`, often in `make prove` (CARNET_COUNTS=full)."""

from __future__ import annotations

import os

_FORMS = ("quick", "full")
_known: dict[str, tuple[int, int]] = {}


def form() -> str:
    """Return which counts are in force: ``quick``, or ``full`` where CARNET_COUNTS says so."""
    wanted = os.environ.get("CARNET_COUNTS", "quick")
    if wanted not in _FORMS:
        msg = f"CARNET_COUNTS is {wanted!r}: set it to 'quick' or 'full', or leave it out for 'quick'"
        raise ValueError(msg)
    return wanted


def count(name: str, *, quick: int, full: int) -> int:
    """Return how often the proof `name` is to repeat, and enter both counts in the table.

    One name, one pair: the same name with other figures is an error.
    """
    if not 0 < quick <= full:
        msg = f"counts of {name}: quick ({quick}) must be positive and at most full ({full})"
        raise ValueError(msg)
    if _known.setdefault(name, (quick, full)) != (quick, full):
        msg = f"counts of {name}: {quick} and {full}, where {_known[name]} were entered before"
        raise ValueError(msg)
    return full if form() == "full" else quick


def table() -> dict[str, dict[str, int]]:
    """Return all counts that were asked for so far, by name."""
    return {name: dict(zip(_FORMS, pair, strict=True)) for name, pair in sorted(_known.items())}
