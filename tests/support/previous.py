"""The version before this one, as it is in the history of this repository: its brokers, and its SDK.

After a release, `PREVIOUS` becomes the commit of that release.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["PREVIOUS", "Previous", "unpack_previous"]

PREVIOUS: Final = "60c1f4fa04b3bb112099a5022f11b1f4e9431922"
"""The first commit whose shared store is laid out as that of the first release."""

_ROOT: Final = Path(__file__).parents[2]

# The interpreter is replaced, so that whatever the broker starts is of the same version.
_RUN: Final = """
import os
import sys
os.environ["PYTHONPATH"] = os.pathsep.join({paths!r})
os.execv(sys.executable, [sys.executable, "-m", "carnet_broker", *sys.argv[1:]])
"""


@dataclass(frozen=True, slots=True)
class Previous:
    """The files of the previous version."""

    directory: Path

    @property
    def protos(self) -> Path:
        """Its interface."""
        return self.directory / "protos"

    @property
    def paths(self) -> list[str]:
        """Where Python finds its packages."""
        return [str(self.directory / "client"), str(self.directory / "broker")]

    @property
    def command(self) -> tuple[str, ...]:
        """What Python is told to run, as `start_fleet` and `Replica.start` take it."""
        script = self.directory / "run.py"
        script.write_text(_RUN.format(paths=self.paths))
        return (str(script),)


def unpack_previous(directory: Path) -> Previous:
    """Write the previous version into `directory`. Fails where this clone does not have it."""
    here = subprocess.run(
        ["git", "cat-file", "-e", f"{PREVIOUS}^{{commit}}"],  # noqa: S607 - git, wherever it is
        cwd=_ROOT,
        capture_output=True,
        check=False,
    )
    assert here.returncode == 0, (
        f"commit {PREVIOUS}, the version before this one, is not in this clone: run 'git fetch --unshallow', or have"
        " the pipeline clone the whole history (GitLab: GIT_DEPTH: 0, GitHub: fetch-depth: 0)"
    )
    directory.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", PREVIOUS, "client", "broker", "protos"],  # noqa: S607 - as above
        cwd=_ROOT,
        capture_output=True,
        check=True,
    ).stdout
    subprocess.run(["tar", "-x"], cwd=directory, input=archive, check=True)  # noqa: S607 - tar, wherever it is
    return Previous(directory)
