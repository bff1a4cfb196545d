"""What every test may ask for. Fixtures live in `tests/support`; nothing is started before a test asks for it."""

from __future__ import annotations

pytest_plugins = ["support.vault"]
