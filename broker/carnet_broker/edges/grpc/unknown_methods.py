# ruff: noqa: SLF001 - gRPC's private side is the subject of this file
"""Answers calls of methods that nobody serves, and so keeps one of them from ending the server.

From version 1.84 on, the main loop of grpc.aio's server decodes the path of a call to an unknown method itself. A path
that is not UTF-8 raises there, and the server shuts down for good: one call of one client whose handshake passed. So
such calls do not reach that loop. It asks for the next one through a method of its own that can be overridden, and all
our methods are registered, so what it asks for there is never ours.

All of this is gRPC's private side. Where a version has it otherwise, nothing is overridden; then there is still
`app.Broker.serve`, which ends the process when a listener ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined] # compiled, without types

__all__ = ["guarded_against_unknown_methods"]

_TEXT: Final = "there is no such method"


class _GuardedServer(cygrpc.AioServer):  # type: ignore[misc] # as above
    """grpc.aio's server, which answers unknown methods without ever looking at their names."""

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """Return the future of the next call of `method`; None asks for those of all that are not registered."""
        if method is None:
            return asyncio.get_running_loop().create_task(self._answer_unknown_methods())
        future: asyncio.Future[Any] = super()._make_request_call_future(method)
        return future

    async def _answer_unknown_methods(self) -> None:
        """Answer UNIMPLEMENTED until the server stops."""
        loop = asyncio.get_running_loop()
        answers: set[asyncio.Task[None]] = set()
        while self.is_running():
            with suppress(cygrpc._RequestCallError):  # The call went away before it was taken.
                answer = loop.create_task(_refuse(await self._request_call()))
                answers.add(answer)
                answer.add_done_callback(answers.discard)
        raise cygrpc._RequestCallError  # As gRPC's own: there is no further call.


async def _refuse(call: object) -> None:
    context = cygrpc._ServicerContext(call, None, None, asyncio.get_running_loop())
    with suppress(grpc.aio.AbortError, cygrpc.ExecuteBatchError):  # The latter: the caller went away.
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, _TEXT)


@contextmanager
def guarded_against_unknown_methods() -> Iterator[None]:
    """Make `grpc.aio.server`, called inside the block, return a server that is guarded."""
    original = cygrpc.AioServer
    cygrpc.AioServer = _GuardedServer
    try:
        yield
    finally:
        cygrpc.AioServer = original
