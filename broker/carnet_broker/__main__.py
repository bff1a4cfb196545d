"""``python -m carnet_broker`` is ``carnet-broker``."""

from __future__ import annotations

from carnet_broker.cli import main

if __name__ == "__main__":
    main()
