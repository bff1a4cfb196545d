"""The version before this one: its brokers, and its SDK.

They come from a file, made of the history of this repository, so that a checkout without history can run the tests:
``git archive COMMIT broker client protos | xz -9e > tests/previous/SHORT.tar.xz``. After a release, `PREVIOUS` becomes
the commit of that release, and the file is made anew.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["PREVIOUS", "Previous", "unpack_previous"]

PREVIOUS: Final = "60c1f4fa04b3bb112099a5022f11b1f4e9431922"
"""The first commit whose shared store is laid out as that of the first release."""

_ARCHIVE: Final = Path(__file__).parents[1] / "previous" / f"{PREVIOUS[:7]}.tar.xz"

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
    """Write the previous version into `directory`."""
    directory.mkdir(parents=True)
    with tarfile.open(_ARCHIVE, "r:xz") as archive:
        archive.extractall(directory, filter="data")
    return Previous(directory)
