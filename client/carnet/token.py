"""A token as a caller holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

__all__ = ["Token"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token, good for one audience until `expires_at`. Neither `repr` nor `str` show it: a log cannot leak it."""

    value: str = field(repr=False)
    """The token itself, as it goes into ``authorization: Bearer``. Never log it."""
    audience: str
    """The one service that it is for."""
    scopes: tuple[str, ...]
    """What it allows there, sorted."""
    expires_at: datetime
    """When it ends by this host's clock, aware UTC: its life, counted from when it was asked for."""
    identity_thumbprint: str
    """The `Identity.thumbprint` of the certificate that it was asked for with, and that it works with."""
