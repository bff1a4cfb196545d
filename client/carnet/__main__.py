"""The command ``carnet``; ``python -m carnet`` is the same."""

from __future__ import annotations

import sys
from typing import NoReturn

from carnet.cli import run

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
