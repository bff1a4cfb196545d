"""What every test may ask for. Fixtures live in `tests/support`; nothing is started before a test asks for it."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # `make pytest` has the workers measured by coverage. What a test starts is not: it would be slower, and say little.
    os.environ.pop("COVERAGE_PROCESS_START", None)

pytest_plugins = ["support.postgres", "support.store_places", "support.vault"]
