"""The command line of the SDK.

Every error is one line on stderr that names what is wrong and what to do; there is an exit code for each way in which a
script would react. The modules of the commands load gRPC and cryptography inside their functions: help needs neither.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from carnet.cli.inspect import inspect
from carnet.cli.token import token
from carnet.cli.verify import verify
from carnet.errors import CarnetError, ConfigError, InvalidIdentityError

__all__ = ["run"]

_EPILOG = """\b
Exit codes:
  0  it worked: a token was issued, or is good
  1  refused by the broker, or the token is not good
  2  bad input or configuration
  3  unavailable: the broker could not answer, try again later

\b
Settings come from the environment: CARNET_BROKER and CARNET_TRUST (host:port[,host:port]), CARNET_BROKER_NAME,
CARNET_CERT_FILE, CARNET_KEY_FILE, CARNET_CA_FILE, CARNET_ISSUER, CARNET_AUDIENCE.

\b
Shell completion: eval "$(_CARNET_COMPLETE=bash_source carnet)"   (or zsh_source; for fish:
_CARNET_COMPLETE=fish_source carnet | source)
"""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog=_EPILOG,
    no_args_is_help=False,
)
@click.version_option(package_name="carnet")
def _carnet() -> None:
    """Get, read and check Carnet tokens."""


_carnet.add_command(token)
_carnet.add_command(inspect)
_carnet.add_command(verify)


def run(arguments: Sequence[str]) -> int:
    """Run the command that `arguments` are, without the program's name, and return its exit code."""
    try:
        result = _carnet.main(list(arguments), prog_name="carnet", standalone_mode=False)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        remedy = "" if context is None else f": see '{context.command_path} --help'"
        return _complain(f"{error.format_message().rstrip('.')}{remedy}", 2)
    except click.Abort:
        return _complain("interrupted", 130)
    except (ConfigError, InvalidIdentityError) as error:
        return _complain(str(error), 2)
    except CarnetError as error:
        return _complain(str(error), 3 if error.retryable else 1)
    return result if isinstance(result, int) else 0


def _complain(message: str, code: int) -> int:
    # One line: whatever a message quotes, a log reader sees one record.
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code
