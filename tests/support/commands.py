"""The commands as processes of their own, and what every failure of theirs must look like."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.vault import VaultPlace

__all__ = ["Ended", "one_line", "run_command", "vault_environment"]

_OURS = ("VAULT_", "CARNET_", "BAO_")


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str
    seconds: float


def run_command(
    *arguments: str | Path,
    environment: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    within: float = 30,
) -> Ended:
    """Run ``python -m`` with `arguments` to its end, with nothing of ours in its environment but `environment`.

    `before` is a command that starts it, for instance one that takes rights away.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    started = time.monotonic()
    done = subprocess.run(
        [*before, sys.executable, "-m", *(str(argument) for argument in arguments)],
        env=inherited | {"PYTHONPATH": os.pathsep.join(sys.path)} | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=within,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


def one_line(ended: Ended, code: int = 2) -> str:
    """Return the one line that says what is wrong, with nothing else printed anywhere."""
    lines = ended.err.splitlines()
    assert (code, "", 1) == (ended.code, ended.out, len(lines)), ended
    assert lines[0].startswith("error: "), ended
    assert "Traceback" not in ended.err
    return lines[0].removeprefix("error: ")


def vault_environment(place: VaultPlace, role: str) -> dict[str, str]:
    """Return what a pipeline with a role in Vault has in its environment."""
    credentials = place.bootstrapped.credentials[role]
    found = {
        "VAULT_ADDR": place.server.address,
        "VAULT_ROLE_ID": credentials.role_id_file.read_text().strip(),
        "VAULT_SECRET_ID_FILE": str(credentials.secret_id_file),
        "CARNET_ENVIRONMENT": place.environment,
    }
    return found if place.server.ca_file is None else found | {"VAULT_CACERT": str(place.server.ca_file)}
