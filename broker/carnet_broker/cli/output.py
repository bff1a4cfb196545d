"""What every command prints, and how it ends.

Exit codes: 0 it is so, 1 it is not (denied, failed, refused), 2 it could not be found out (bad input, or a wrong file).
A result goes to standard output; why there is none goes to standard error, in one line that names the file or the
variable and says what to do.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, ParamSpec, TypeVar

import click

from carnet.errors import CarnetError

__all__ = ["BAD_INPUT", "NO", "cli_errors", "complain", "json_option", "show"]

NO: Final = 1
"""The exit code of an answer that is no."""
BAD_INPUT: Final = 2
"""The exit code where there is no answer."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")


def cli_errors(command: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Turn an error that was meant, in `command`, into one line on standard error and exit code 2."""

    @functools.wraps(command)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return command(*args, **kwargs)
        except CarnetError as error:
            complain(error)
            raise SystemExit(BAD_INPUT) from None

    return guarded


def complain(message: object) -> None:
    """Print `message` as the one line that says why there is no result, whatever it quotes."""
    click.echo(f"error: {' '.join(str(message).split())}", err=True)


def show(result: Mapping[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    """Print `result` as JSON, or else `lines`, which say the same to people."""
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        for line in lines:
            click.echo(line)
