"""A proxy before a real OpenBao that passes everything through, until a test tells it to lie.

It is `LyingVault` with the truth as its answer: a request goes on to OpenBao as it came, and the answer comes back.
"""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from carnet_broker.demo.openbao import OpenBao
from support.lying_vault import Lie, LyingVault, Received, reply

__all__ = ["VaultProxy", "proxy_before"]

_OWN_HEADERS = frozenset({"host", "content-length", "connection"})


class VaultProxy(LyingVault):
    """Passes requests through to `server`. Made by `proxy_before`."""

    def __init__(self, server: OpenBao) -> None:
        super().__init__()
        self._host = server.address.rpartition("/")[2]
        self._context = None if server.ca_file is None else ssl.create_default_context(cafile=server.ca_file)
        self._honest_again = threading.Event()
        self.be_honest()

    def be_honest(self) -> None:
        """Pass everything through, also what was held back meanwhile."""
        self.lies = {}
        self.otherwise = self.forward
        self._honest_again.set()

    def lie(self, lie: Lie | bytes) -> None:
        """Answer everything with `lie`."""
        self._honest_again = threading.Event()
        self.otherwise = lie

    def forward(self, received: Received, send: Callable[[bytes], None]) -> None:
        """Ask OpenBao, and send its answer."""
        send(self.ask(received))

    def ask(self, received: Received) -> bytes:
        """Ask OpenBao, and return its answer as bytes of HTTP. Raises `OSError`, which hangs up."""
        connection: http.client.HTTPConnection
        if self._context is None:
            connection = http.client.HTTPConnection(self._host, timeout=10)
        else:
            connection = http.client.HTTPSConnection(self._host, timeout=10, context=self._context)
        headers = {name: value for name, value in received.headers.items() if name not in _OWN_HEADERS}
        try:
            connection.request(received.method, f"/v1/{received.path}", received.body or None, headers)
            answer = connection.getresponse()
            return reply(answer.status, answer.read())
        except http.client.HTTPException as error:
            raise ConnectionAbortedError from error
        finally:
            connection.close()

    def hang(self, received: Received, send: Callable[[bytes], None]) -> None:
        """Say nothing until the proxy is honest again, and pass the request through then."""
        self._honest_again.wait(60)
        self.forward(received, send)

    def hang_up(self, received: Received, send: Callable[[bytes], None]) -> NoReturn:
        """Close the connection without a word."""
        del received, send
        raise ConnectionAbortedError


@contextmanager
def proxy_before(server: OpenBao) -> Iterator[VaultProxy]:
    """Serve for the length of the block."""
    proxy = VaultProxy(server)
    with proxy.listening():
        try:
            yield proxy
        finally:
            proxy.be_honest()
