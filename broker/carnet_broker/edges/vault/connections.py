"""Connections of urllib3 that are bounded in time and size, whatever the other side does.

urllib3 bounds each *read*: a server that sends one byte every few seconds keeps it for hours. Here the sockets know the
call that this thread makes over them. Its deadline covers name resolution, connecting, the TLS handshake, and every
byte both ways; and no more bytes are taken than it allows.
"""

from __future__ import annotations

import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

__all__ = ["AnswerTooLargeError", "ExchangeError", "NotTrustedError", "Pool", "TlsPool", "bounds"]

_IDLE_SECONDS: Final = 30.0
"""Shorter than what servers and NAT tables allow a silent connection."""
_Result = TypeVar("_Result")


class ExchangeError(Exception):
    """There is no answer. The text is ours alone, and holds nothing that the other side said.

    It is no `OSError`: neither urllib3 nor requests wraps it in an error of their own.
    """


class NotTrustedError(ExchangeError):
    """The server showed a certificate that is not trusted, or is not for its name."""


class AnswerTooLargeError(ExchangeError):
    """The answer is longer than its operation allows."""

    beginning = b""
    """What came of its content."""


class _Call(threading.local):
    """What the call that this thread makes may take. Outside of `bounds` that is nothing."""

    deadline = -math.inf
    max_bytes = 0
    received = 0

    def left(self) -> float:
        """Return the seconds that are left, or raise `TimeoutError`."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


_call = _Call()


@contextmanager
def bounds(*, deadline: float, max_bytes: int) -> Iterator[None]:
    """Let this thread use connections until `deadline` (of the monotonic clock), and receive up to `max_bytes`."""
    _call.deadline, _call.max_bytes, _call.received = deadline, max_bytes, 0
    try:
        yield
    finally:
        _call.deadline = -math.inf


class _Bounded:
    """Holds every operation of a socket to the call of this thread."""

    used_at = 0.0

    def recv_into(self, *args: object) -> int:
        received: int = self._in_time(super().recv_into, *args)  # type: ignore[misc]
        _call.received += received
        if _call.received > _call.max_bytes:
            msg = f"the answer is longer than {_call.max_bytes} bytes"
            raise AnswerTooLargeError(msg)
        return received

    def send(self, *args: object) -> int:
        return self._in_time(super().send, *args)  # type: ignore[misc, no-any-return]

    def sendall(self, *args: object) -> None:
        self._in_time(super().sendall, *args)  # type: ignore[misc]

    def _in_time(self, operation: Callable[..., _Result], *args: object) -> _Result:
        try:
            self.settimeout(_call.left())  # type: ignore[attr-defined]
            self.used_at = time.monotonic()
            return operation(*args)
        except OSError as error:
            raise _failure(error) from None


class _Socket(_Bounded, socket.socket):
    """A plain socket of a call."""


class _TlsSocket(_Bounded, ssl.SSLSocket):
    """A TLS socket of a call."""


class _Connection(HTTPConnection):
    """A connection over such a socket."""

    def connect(self) -> None:
        try:
            super().connect()
        except OSError as error:
            raise _failure(error) from None

    def _new_conn(self) -> socket.socket:
        failure = OSError(0, "the name has no address")
        for family, kind, protocol, _, address in _resolve(self.host, self.port):
            plain = _Socket(family, kind, protocol)
            try:
                plain.settimeout(_call.left())
                plain.connect(address)
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                plain.settimeout(_call.left())  # For the whole of a handshake.
            except OSError as error:
                plain.close()
                failure = error
            else:
                return plain
        raise failure

    @property
    def is_connected(self) -> bool:
        """Whether this connection may be used again."""
        fresh = isinstance(self.sock, _Bounded) and time.monotonic() - self.sock.used_at < _IDLE_SECONDS
        return fresh and super().is_connected


class _TlsConnection(_Connection, HTTPSConnection):
    """The same over TLS. `ca_certs` and `ca_cert_dir` are all that is trusted, and are read for each connection."""

    def connect(self) -> None:
        self.ssl_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # Checks the chain and the name.
        self.ssl_context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.ssl_context.sslsocket_class = _TlsSocket
        try:
            super().connect()
        except urllib3.exceptions.SSLError as error:  # From reading the file; what TLS itself raises is an `OSError`.
            msg = f"the CA file {self.ca_certs} cannot be used ({error})"
            raise ExchangeError(msg) from None


class Pool(urllib3.HTTPConnectionPool):
    """Connections without TLS."""

    ConnectionCls = _Connection


class TlsPool(urllib3.HTTPSConnectionPool):
    """Connections with TLS."""

    ConnectionCls = _TlsConnection


def _resolve(host: str, port: int) -> list[tuple[Any, ...]]:
    """Return the addresses of `host`. The system's resolver knows no deadline, so it works in a thread of its own."""
    found: Future[list[tuple[Any, ...]]] = Future()

    def look_up() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.set_exception(error)

    threading.Thread(target=look_up, name="carnet-resolve", daemon=True).start()
    try:
        return found.result(_call.left())
    except TimeoutError:
        msg = f"the name {host} was not resolved in time"
    except (OSError, UnicodeError) as error:
        msg = f"the name {host} is not known ({getattr(error, 'strerror', 'it is none')})"
    raise ExchangeError(msg)


def _failure(error: OSError) -> ExchangeError:
    """Say it in words of ours, of OpenSSL or of the system, and none of the other side's."""
    if isinstance(error, TimeoutError):
        return ExchangeError("it did not answer in time")
    if isinstance(error, ssl.SSLCertVerificationError):
        return NotTrustedError(f"TLS failed ({error.verify_message})")
    if isinstance(error, ssl.SSLError):
        return ExchangeError(f"TLS failed ({(error.reason or 'no reason given').lower().replace('_', ' ')})")
    return ExchangeError(f"no connection ({error.strerror or type(error).__name__})")
