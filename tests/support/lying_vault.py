"""A server that plays Vault badly: over real sockets, byte by byte as a test says.

It knows how to answer a login, so that what lies is the answer after it, unless a test lies about the login too.
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

__all__ = ["CANARY_TOKEN", "LyingVault", "Received", "drip", "once", "reply"]

CANARY_TOKEN = "s.canary-token-of-vault"

Lie = Callable[["Received", Callable[[bytes], None]], None]
"""Answers one request by what it sends. An `OSError` that it raises closes the connection."""


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = field(repr=False)

    @property
    def data(self) -> dict[str, Any]:
        """The JSON object in the body."""
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found


def reply(status: int, body: object, *, headers: dict[str, str] | None = None, reason: str = "X") -> bytes:
    """Return a whole HTTP answer. `body` is sent as JSON if it is not bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
    head = f"HTTP/1.1 {status} {reason}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return head.encode("latin-1") + b"\r\n" + content


class LyingVault:
    """Listens on 127.0.0.1. `lies` answers for a path (without ``/v1/``); other paths are answered with 404."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.lies: dict[str, Lie | bytes] = {"auth/approle/login": self.login()}
        self.otherwise: Lie | bytes = reply(404, {"errors": []})
        self.received: list[Received] = []
        self.stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()

    @property
    def address(self) -> str:
        """The URL."""
        port = self._listener.getsockname()[1]
        return f"http://127.0.0.1:{port}" if self._tls is None else f"https://localhost:{port}"

    @staticmethod
    def login(token: str = CANARY_TOKEN, *, life: object = 3600, renewable: object = True) -> bytes:
        """Return a good answer to a login."""
        return reply(200, {"auth": {"client_token": token, "lease_duration": life, "renewable": renewable}})

    @contextmanager
    def listening(self) -> Iterator[LyingVault]:
        """Serve for the length of the block."""
        accepting = threading.Thread(target=self._accept)
        accepting.start()
        try:
            yield self
        finally:
            self.stopping.set()
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            self._listener.close()
            for connection in list(self._open):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in self._threads:
                thread.join()

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            self._answer(connection if self._tls is None else self._tls.wrap_socket(connection, server_side=True))
        connection.close()
        self._open.discard(connection)

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while (received := _read(stream)) is not None:
                self.received.append(received)
                lie = self.lies.get(received.path, self.otherwise)
                if isinstance(lie, bytes):
                    connection.sendall(lie)
                    continue
                lie(received, connection.sendall)


def _read(stream: Any) -> Received | None:  # noqa: ANN401 - a socket file
    first = stream.readline().decode("latin-1").split()
    if len(first) != 3:
        return None
    headers: dict[str, str] = {}
    while line := stream.readline().strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    body = stream.read(int(headers.get("content-length", "0")))
    return Received(first[0], first[1].removeprefix("/v1/"), headers, body)


def once(answer: bytes) -> Lie:
    """Return a lie that sends `answer` and hangs up."""

    def lie(_: Received, send: Callable[[bytes], None]) -> NoReturn:
        send(answer)
        raise ConnectionAbortedError

    return lie


def drip(data: bytes, vault: LyingVault, *, every: float = 0.05) -> Lie:
    """Return a lie that sends `data` one byte at a time, then nothing more, and keeps the connection open."""

    def lie(_: Received, send: Callable[[bytes], None]) -> None:
        for number in range(len(data)):
            send(data[number : number + 1])
            if vault.stopping.wait(every):
                return
        vault.stopping.wait(30)

    return lie
