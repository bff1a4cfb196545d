"""How long a TLS configuration may still be in use after it was replaced. Without gRPC, for the configuration file."""

from __future__ import annotations

from typing import Final

__all__ = ["SETTLED_AFTER"]

SETTLED_AFTER: Final = 0.5
"""Seconds; who has asked for a configuration needs microseconds to be through."""
