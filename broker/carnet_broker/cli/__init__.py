"""``carnet-broker``: the command line of the broker.

Commands import what they need when they run, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final, NoReturn

import click

from carnet_broker.cli.output import BAD_INPUT, complain

__all__ = ["main", "run"]

_INTERRUPTED: Final = 130

_COMMANDS: Final = {
    "serve": "carnet_broker.cli.serve:serve",
    "check-config": "carnet_broker.cli.serve:check_config",
    "keys": "carnet_broker.cli.keys:keys",
    "policy": "carnet_broker.cli.policy:policy",
    "demo": "carnet_broker.cli.demo:demo",
}


class _Lazy(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order in which they are met."""
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of that name."""
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: Any = getattr(import_module(module), name)
        assert isinstance(command, click.Command)  # noqa: S101 - the table above names commands
        return command


@click.command(
    cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}, no_args_is_help=False
)
@click.version_option(package_name="carnet", prog_name="carnet-broker")
def _carnet_broker() -> None:
    """Run the Carnet broker: it issues short-lived tokens to workloads that authenticate by mutual TLS.

    Shell completion: eval "$(_CARNET_BROKER_COMPLETE=bash_source carnet-broker)" (or zsh_source, fish_source).
    """


def run(arguments: Sequence[str]) -> int:
    """Run the command that `arguments` are, without the program's name, and return its exit code."""
    try:
        result = _carnet_broker.main(list(arguments), prog_name="carnet-broker", standalone_mode=False)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        remedy = "" if context is None else f": see '{context.command_path} --help'"
        complain(f"{error.format_message().rstrip('.')}{remedy}")
        return BAD_INPUT
    except click.Abort:
        complain("interrupted")
        return _INTERRUPTED
    return result if isinstance(result, int) else 0


def main() -> NoReturn:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))
