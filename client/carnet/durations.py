"""Durations as people write them: ``500ms``, ``90s``, ``10m``, ``24h``, ``7d``.

One whole number and one unit, nothing else: no sums (``1h30m``), no fractions, no bare numbers. What a bare ``30``
means depends on who reads it, so it is refused rather than guessed.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

__all__ = ["MAX_DURATION", "format_duration", "parse_duration"]

MAX_DURATION: Final = timedelta(days=3660)
"""The longest duration that is read: ten years. Longer is a slip of the finger."""

_MILLISECOND: Final = timedelta(milliseconds=1)
_UNITS: Final = {
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
    "ms": _MILLISECOND,
}
# Twelve digits hold ten years of milliseconds and keep the multiplication inside what a timedelta can hold.
_FORM: Final = re.compile(r"([0-9]{1,12})(ms|s|m|h|d)")


def parse_duration(text: str) -> timedelta:
    """Return the duration that `text` is.

    Raises `ValueError` where it is not one, is zero, or is longer than `MAX_DURATION`. The message says what is wrong
    and what to write; which setting it was is the caller's to add.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        msg = f"{text[:40]!r} is not a duration; write a whole number and one unit: 500ms, 90s, 10m, 24h or 7d"
        raise ValueError(msg)
    # In whole milliseconds first: a timedelta overflows where an int does not.
    milliseconds = int(found[1]) * (_UNITS[found[2]] // _MILLISECOND)
    if milliseconds == 0:
        msg = f"{text!r} is no time at all; give a duration longer than zero"
        raise ValueError(msg)
    if milliseconds > MAX_DURATION // _MILLISECOND:
        msg = f"{text!r} is too long; give at most {format_duration(MAX_DURATION)}"
        raise ValueError(msg)
    return timedelta(milliseconds=milliseconds)


def format_duration(duration: timedelta) -> str:
    """Return the shortest form of `duration` with the largest unit that divides it, for instance ``90s`` or ``2m``.

    Parts of a millisecond are cut off; what is left of nothing is ``0s``. What `parse_duration` reads is written so
    that it reads the same again. Raises `ValueError` where `duration` is negative.
    """
    if duration < timedelta(0):
        msg = f"{duration!r} is negative, and a duration has no sign"
        raise ValueError(msg)
    milliseconds = duration // _MILLISECOND
    if milliseconds == 0:
        return "0s"
    length = timedelta(milliseconds=milliseconds)
    unit = next(unit for unit, size in _UNITS.items() if length % size == timedelta(0))
    return f"{length // _UNITS[unit]}{unit}"
