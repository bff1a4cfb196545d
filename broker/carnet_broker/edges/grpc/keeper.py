"""A connection of a listener to itself that stays in the middle of its TLS handshake.

In gRPC core a handshake under way holds a reference on the TLS configuration that it was begun with, and gives it back
when it is over (`factory_ref` of `tsi_ssl_handshaker`). So the configuration cannot be freed while this one is open. It
shows no certificate, since it never gets so far.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import ssl
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final, Protocol

__all__ = ["Keeper", "KeeperState", "TlsKeeper", "keepers_of"]

_ALL_ADDRESSES: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound here
_SERVER_HELLO: Final = (22, 2)
"""The type of the record, and of the message in it (RFC 8446 sections 5.1 and 4)."""
_BOTH_TYPES: Final = 6
"""As many bytes have them: the first and the last of these."""


class KeeperState(StrEnum):
    """How far a keeper is."""

    WAITING = "waiting"
    """The listener has not answered."""
    HOLDING = "holding"
    """The listener has answered: a handshake of ours is under way, and waits for us."""
    GONE = "gone"


class Keeper(Protocol):
    """A handshake that is never finished."""

    def state(self) -> KeeperState:
        """Return how far it is; does not wait."""

    def close(self) -> None:
        """Give it up."""


class TlsKeeper:
    """A keeper of the listener at `address`. Nothing here waits. Raises `OSError` where there can be none."""

    def __init__(self, family: int, address: tuple[Any, ...]) -> None:
        self._answer = b""
        self._state = KeeperState.WAITING
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)  # noqa: FBT003 - as socket has it
        # Connecting to this host takes no time, unless the listener has more connections waiting than it may have.
        with contextlib.suppress(BlockingIOError):
            self._socket.connect(address)
        self._socket.sendall(_client_hello())

    def __del__(self) -> None:
        # Those of a listener that has stopped are given up with it. Its socket may be what could not be had.
        if (mine := getattr(self, "_socket", None)) is not None:
            mine.close()

    def state(self) -> KeeperState:
        """Return how far it is; does not wait."""
        if self._state is not KeeperState.GONE:
            self._read()
        return self._state

    def close(self) -> None:
        """Give it up."""
        self._state = KeeperState.GONE
        self._socket.close()

    def _read(self) -> None:
        try:
            while chunk := self._socket.recv(65_536):
                self._answer = (self._answer + chunk)[:_BOTH_TYPES]
        except BlockingIOError:
            if len(self._answer) < _BOTH_TYPES:
                return
            if (self._answer[0], self._answer[-1]) == _SERVER_HELLO:
                self._state = KeeperState.HOLDING
                return
        except OSError:
            pass
        self.close()


def keepers_of(host: str, port: int) -> Callable[[], Keeper | None] | None:
    """Return what begins a keeper of the listener at `host` and `port`, or returns None where there can be none.

    None where the address cannot be resolved. Names are resolved once, here.
    """
    host = _ALL_ADDRESSES.get(host.strip("[]"), host.strip("[]"))
    with contextlib.suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return functools.partial(_keeper, family, address)
    return None


def _keeper(family: int, address: tuple[Any, ...]) -> Keeper | None:
    with contextlib.suppress(OSError):  # No descriptor is left, for one.
        return TlsKeeper(family, address)
    return None


@functools.cache
def _client_hello() -> bytes:
    """Return the first message of a TLS client. One serves all keepers: none gets so far that it had to be its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    sent = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), sent)
    with contextlib.suppress(ssl.SSLWantReadError):
        connection.do_handshake()
    return sent.read()
