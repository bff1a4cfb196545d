"""``/livez``, ``/readyz``, ``/metrics`` and ``/oauth2/jwks``: read-only, without TLS, without secrets.

`/readyz` answers 503 with the problems when this broker cannot issue; a broker that is only degraded answers 200 and
says what is amiss, because a failing Vault must not take every broker out of its balancer at once.

Anybody who reaches the port can connect. A connection that has not sent a whole request soon, and one that is old, is
closed: idle connections of a stranger must not keep a probe from its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Final, cast

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from carnet_broker.core.readiness import Readiness
from carnet_broker.signing import KeyringHolder

__all__ = ["ImpatientProtocol", "plain_app"]

_FIRST_REQUEST_WITHIN: Final = 5.0
_LONGEST_CONNECTION: Final = 60.0
_ANSWER_WITHIN: Final = 5.0


class ImpatientProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1, which by itself waits without end for the first request of a connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to count."""
        super().connection_made(transport)
        self._ends = [
            self.loop.call_later(_FIRST_REQUEST_WITHIN, self._close_unless_asked),
            self.loop.call_later(_LONGEST_CONNECTION, self._close_when_answered),
        ]

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting."""
        super().connection_lost(exc)
        for end in self._ends:
            end.cancel()

    def _close_unless_asked(self) -> None:
        if self._cycle is None:
            self.transport.close()

    def _close_when_answered(self) -> None:
        if self._cycle is None or self._cycle.response_complete:
            self.transport.close()
        else:  # A request is being answered; that takes milliseconds.
            self._ends.append(self.loop.call_later(_ANSWER_WITHIN, self.transport.close))

    @property
    def _cycle(self) -> RequestResponseCycle | None:
        """The newest request; None before the first, which uvicorn's types do not say."""
        return cast("RequestResponseCycle | None", self.cycle)


def plain_app(
    *,
    readiness: Callable[[], Readiness],
    holder: KeyringHolder,
    max_age: timedelta,
    registry: CollectorRegistry,
) -> Starlette:
    """Return the ASGI application of the plain port."""

    async def livez(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        found = readiness()
        body = {"ready": found.ready, "problems": list(found.problems), "degraded": list(found.degraded)}
        return JSONResponse(body, status_code=200 if found.ready else 503)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def jwks(_: Request) -> Response:
        view = holder.view
        if view is None or not view.jwks:
            # Never an empty set: a verifier would take it as "trust no key" and drop the good ones.
            return JSONResponse({"error": "no keyring is loaded"}, status_code=503, headers={"Retry-After": "1"})
        headers = {"Cache-Control": f"public, max-age={max_age // timedelta(seconds=1)}"}
        return Response(view.jwks, media_type="application/jwk-set+json", headers=headers)

    routes = [
        Route("/livez", livez),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
        Route("/oauth2/jwks", jwks),
    ]
    return Starlette(routes=routes)
