"""The command ``carnet``; ``python -m carnet`` is the same."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

from carnet.cli import run

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line of this process."""
    # What goes on in the background is for services; a command says what matters in its one line.
    # gRPC's C++ part writes lines of its own for a failed handshake. It reads this at its import, which comes later.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.getLogger("carnet").addHandler(logging.NullHandler())
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
