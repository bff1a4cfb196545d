"""Durations and moments, as they are written on a command line and shown to people."""

from __future__ import annotations

from datetime import datetime, timedelta

import click

from carnet.durations import parse_duration

__all__ = ["DurationType", "about", "moment_and_distance"]


class DurationType(click.ParamType[timedelta]):
    """A duration: ``90s``, ``10m``."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return the duration that `value` is, or fail with what to write."""
        if isinstance(value, timedelta):
            return value
        try:
            return parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def moment_and_distance(at: datetime, now: datetime) -> str:
    """Return a moment, and how far it is from `now`."""
    distance = about(abs(now - at))
    return f"{at.isoformat(timespec='seconds')} ({f'{distance} ago' if at <= now else f'in {distance}'})"


def about(duration: timedelta) -> str:
    """Return a duration in its two largest units, for people."""
    seconds = int(duration.total_seconds())
    for unit, size, lesser, lesser_size in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size}{unit} {seconds % size // lesser_size}{lesser}"
    return f"{seconds}s"
