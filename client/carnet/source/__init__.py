"""Where a workload gets its tokens: `Client` for threads, `AsyncClient` for asyncio."""

from __future__ import annotations

from carnet.source.aio import AsyncClient
from carnet.source.blocking import Client
from carnet.token import Token

__all__ = ["AsyncClient", "Client", "Token"]
