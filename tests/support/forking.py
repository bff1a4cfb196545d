"""Commands without the half second that each needs to import its libraries: one process imports them, and forks.

What runs is a process of its own, with its own arguments, environment, output and exit code. Only what happens while
Python starts is not seen, so each kind of command is also run from the beginning somewhere.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

from support.commands import Ended

__all__ = ["Forking", "forking"]

_IMPORTED: Final = (
    "carnet_broker.app",
    "carnet_broker.cli.keys",
    "carnet_broker.cli.policy",
    "carnet_broker.cli.serve",
    "carnet.cli",
    "carnet.source",
    "carnet.trust",
)
_WITHIN: Final = 30
_OURS: Final = ("VAULT_", "CARNET_", "BAO_")


class Forking:
    """Runs commands, one after the other. Made by `forking`."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self._process = process
        self._directory = directory

    def run(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> Ended:
        """Do what `support.commands.run_command` does."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        out, err = self._directory / "out", self._directory / "err"
        request = {
            "arguments": [str(argument) for argument in arguments],
            "environment": inherited | dict(environment or {}),
            "out": str(out),
            "err": str(err),
        }
        started = time.monotonic()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Ended(code, out.read_text(), err.read_text(), time.monotonic() - started)


@contextmanager
def forking(directory: Path) -> Iterator[Forking]:
    """Start the process that has imported everything; `directory` is for the output of its children."""
    process = subprocess.Popen(
        [sys.executable, "-m", "support.forking"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:  # The end of its input ends it.
        yield Forking(process, directory)


def _become(request: dict[str, Any]) -> NoReturn:
    """Run a command in this process, and end it."""
    signal.alarm(_WITHIN)
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    module, *arguments = request["arguments"]
    sys.argv[:] = [module, *arguments]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - what the interpreter does with it
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    for name in _IMPORTED:
        import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
