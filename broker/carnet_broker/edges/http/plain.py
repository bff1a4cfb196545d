"""``/livez``, ``/readyz``, ``/metrics`` and ``/oauth2/jwks``: read-only, without TLS, without secrets.

`/readyz` answers 503 with the problems when this broker cannot issue; a broker that is only degraded answers 200 and
says what is amiss, because a failing Vault must not take every broker out of its balancer at once.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from carnet_broker.core.readiness import Readiness
from carnet_broker.signing import KeyringHolder

__all__ = ["plain_app"]


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
