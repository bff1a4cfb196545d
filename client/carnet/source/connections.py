"""The channels to the brokers: one for each broker and identity, made when first used.

A connection whose call failed on the way is retired: it takes no new calls, and is closed when the last one on it has
ended. gRPC would wait before it connects anew, and nobody but the caller whose time ran out finds out that a peer fell
silent. Making and closing channels is the caller's (sync and asyncio differ); nothing here waits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from carnet.endpoints import Target
from carnet.identity import Identity

__all__ = ["Connection", "Connections"]

ChannelT = TypeVar("ChannelT")


@dataclass(eq=False, slots=True)
class Connection(Generic[ChannelT]):
    """One channel, and how many calls are on it."""

    target: Target
    thumbprint: str
    channel: ChannelT
    calls: int = 0
    retired: bool = False


class Connections(Generic[ChannelT]):
    """The channels that are in use. Not thread-safe."""

    def __init__(self, open_channel: Callable[[Target, Identity], ChannelT]) -> None:
        self._open = open_channel
        self._connections: dict[tuple[Target, str], Connection[ChannelT]] = {}

    def take(self, target: Target, identity: Identity) -> Connection[ChannelT]:
        """Return the connection for one call, which `give_back` must follow."""
        where = (target, identity.thumbprint)
        connection = self._connections.get(where)
        if connection is None:
            connection = Connection(target, identity.thumbprint, self._open(target, identity))
            self._connections[where] = connection
        connection.calls += 1
        return connection

    def give_back(self, connection: Connection[ChannelT], *, failed: bool) -> list[ChannelT]:
        """End one call; `failed` retires the connection. Return the channels to close."""
        connection.calls -= 1
        if failed and not connection.retired:
            self._retire(connection)
        return [connection.channel] if connection.retired and connection.calls == 0 else []

    def keep(self, thumbprints: Collection[str]) -> list[ChannelT]:
        """Retire the connections of all other identities. Return the channels to close."""
        gone = [c for c in self._connections.values() if c.thumbprint not in thumbprints]
        for connection in gone:
            self._retire(connection)
        return [connection.channel for connection in gone if connection.calls == 0]

    def _retire(self, connection: Connection[ChannelT]) -> None:
        connection.retired = True
        del self._connections[connection.target, connection.thumbprint]
