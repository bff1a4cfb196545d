"""The verified caller of the request that is being handled."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

from carnet.claims import Claims
from carnet.errors import ConfigError

__all__ = ["CALLER", "current"]

CALLER: Final[ContextVar[Claims]] = ContextVar("carnet.caller")
"""Set by the server adapters around each handler, and by nobody else."""


def current() -> Claims:
    """Return what the verified token of the caller says.

    Works inside a handler behind one of Carnet's server adapters, also while it iterates over a stream. It is a
    `contextvars.ContextVar`: a task that the handler starts sees it, a thread that it starts does not, unless it runs
    in a copy of the context (`asyncio.to_thread` does); so ask first and hand the claims on.

    Raises `ConfigError` where there is no verified caller: the method is open to callers without a token, or no adapter
    stands before it. It is never None, so nothing is allowed because somebody forgot to look.
    """
    claims = CALLER.get(None)
    if claims is None:
        msg = "there is no verified caller here: put a server adapter of Carnet before this handler, with a rule for it"
        raise ConfigError(msg)
    return claims
