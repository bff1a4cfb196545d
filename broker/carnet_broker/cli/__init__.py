"""``carnet-broker``: the command line of the broker.

A command is imported when it is asked for, so ``--help`` and shell completion answer at once, and also where the
broker's packages are not installed: the SDK alone brings this command too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final, NoReturn

import click
from click.shell_completion import CompletionItem

from carnet_broker.cli.output import BAD_INPUT, complain

__all__ = ["main", "run"]

_INTERRUPTED: Final = 130
_OURS: Final = ("carnet", "carnet_broker")

_COMMANDS: Final = {
    "serve": ("carnet_broker.cli.serve:serve", "Run the broker until SIGTERM or SIGINT."),
    "check-config": (
        "carnet_broker.cli.serve:check_config",
        "Check the configuration and every file that it names, without serving and without asking Vault.",
    ),
    "keys": ("carnet_broker.cli.keys:keys", "Rotate and revoke the signing keys, and see how they stand."),
    "revoke": ("carnet_broker.cli.revoke:revoke", "Cut off a token, a workload or a certificate, now."),
    "policy": ("carnet_broker.cli.policy:policy", "Check a policy, run its tests, and explain what it decides."),
    "demo": (
        "carnet_broker.cli.demo:demo",
        "Start OpenBao, a broker and two services on this machine, and show what works and what is refused.",
    ),
}
"""Where each command is, and the first sentence of its help."""


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
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command: Any = getattr(import_module(module), name)
        assert isinstance(command, click.Command)  # noqa: S101 - the table above names commands
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a command without importing them all."""
        named = [
            CompletionItem(name, help=text) for name, (_, text) in _COMMANDS.items() if name.startswith(incomplete)
        ]
        return named + click.Command.shell_complete(self, ctx, incomplete)


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
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OURS:
            raise
        complain("this command needs the broker's packages: pip install 'carnet[broker]'")
        return BAD_INPUT
    return result if isinstance(result, int) else 0


def main() -> NoReturn:
    """Run the command line of this process."""
    # gRPC's C++ part writes lines of its own for a failed handshake. It reads this at its import, which a command does.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    sys.exit(run(sys.argv[1:]))
