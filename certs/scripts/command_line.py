"""What the scripts here share on the command line: durations, and errors of one line with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from carnet.durations import parse_duration
from carnet.errors import CarnetError, InvalidIdentityError
from carnet.spiffe import SpiffeID

__all__ = ["Duration", "one_line_errors", "parse_trust_domain"]


if TYPE_CHECKING:
    _ParamType = click.ParamType[timedelta]
else:
    _ParamType = click.ParamType  # Older versions of click, which are supported, do not make it generic.


class Duration(_ParamType):
    """A duration in the form that the whole project uses: ``500ms 90s 10m 24h 7d``."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return the duration that `value` is."""
        if isinstance(value, timedelta):
            return value
        try:
            return parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with exit code 2 and one line for everything that the caller can mend."""
    try:
        yield
    except (CarnetError, OSError, ValueError) as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


def parse_trust_domain(text: str) -> str:
    """Return `text` if it is the name of a trust domain, or raise `InvalidIdentityError`."""
    if SpiffeID.parse(f"spiffe://{text}/x").trust_domain != text:
        msg = f"{text[:80]!r} is not the name of a trust domain; give the name alone, like prod.example"
        raise InvalidIdentityError(msg)
    return text
