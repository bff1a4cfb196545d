"""The parts of the process that must all go on, how it is told to stop, and how many connections it can have."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Mapping
from typing import Any

import grpc

from carnet_broker.edges.grpc.listeners import connections_within

__all__ = ["connections_possible", "termination", "until_stopped"]


async def until_stopped(
    stop: asyncio.Event,
    parts: Mapping[str, asyncio.Task[None]],
    log: Any,  # noqa: ANN401 - structlog's loggers have no class
) -> bool:
    """Return True when told to `stop`, False when one of `parts` has ended by itself, which is logged."""
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([stopped, *parts.values()], return_when=asyncio.FIRST_COMPLETED)
    if stopped.done():
        return True
    stopped.cancel()
    for name, task in parts.items():
        if task.done():
            log.error("part_ended", part=name, exc_info=_failure_of(task))
    return False


async def termination(server: grpc.aio.Server) -> None:
    """Return when `server` has ended, or raise what ended it."""
    await server.wait_for_termination()


def _failure_of(task: asyncio.Task[None]) -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def connections_possible(
    wanted: int,
    *,
    others: int,
    log: Any,  # noqa: ANN401 - as above
) -> int:
    """Return how many connections each of two listeners may have: no more than there are descriptors for.

    `others` are the descriptors that all else needs. Strangers can open connections. With no descriptor left for a new
    one, or for the audit file, nobody is served.
    """
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    possible = connections_within((descriptors - others) // 2)
    if possible < wanted:
        log.warning("connections_limited", wanted=wanted, possible=possible, descriptors=descriptors)
    return max(1, min(wanted, possible))
