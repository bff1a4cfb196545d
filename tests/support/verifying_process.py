"""A process with one verifier, which a test asks. It takes nothing but the SDK, so that any version of that will do."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import carnet
from carnet.errors import CarnetError, InvalidTokenError
from support.child_lines import serve_lines


class _Process:
    def __init__(self, settings: dict[str, Any]) -> None:
        staleness = settings.pop("max_staleness")
        identity = carnet.Identity.load(settings.pop("certificate"), settings.pop("key"))
        self._peer = Path(settings.pop("caller_certificate")).read_bytes()
        self.verifier = carnet.AsyncVerifier(identity=identity, max_staleness=timedelta(seconds=staleness), **settings)

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Answer one line."""
        if question["do"] == "status":
            status, position = self.verifier.status(), self.verifier.position()
            return {
                "live": status.live,
                "usable": status.usable,
                "target": status.target,
                "generation": status.generation,
                "version": 0 if position is None else position.revocation_version,
                "from": carnet.__file__,
            }
        try:
            await self.verifier.verify(question["token"], peer_certificate=self._peer)
        except InvalidTokenError as error:
            return {"verdict": str(error.reason)}
        except CarnetError as error:
            return {"verdict": error.code, "why": str(error)}
        return {"verdict": "accepted"}


async def _main() -> None:
    async with AsyncExitStack() as stack:
        process = _Process(json.loads(sys.argv[1]))
        await stack.enter_async_context(process.verifier)
        await serve_lines(process.answer)


if __name__ == "__main__":
    asyncio.run(_main())
