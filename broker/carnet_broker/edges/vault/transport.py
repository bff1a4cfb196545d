"""One HTTP exchange with Vault, bounded in time and size whatever the other side does.

The usual clients bound each *read*: a server that sends one byte every few seconds keeps them for hours. Here one
deadline covers name resolution, connecting, the TLS handshake, and every byte both ways, for the socket itself knows
it. There is no proxy, no redirect, no retry, and nothing from the environment.

Connections are kept and used again. One on which the server has said something, or hung up, is not.
"""

from __future__ import annotations

import http.client
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["Answer", "AnswerTooLargeError", "Call", "ExchangeError", "NotTrustedError", "Transport"]

_MAX_IDLE: Final = 8
_IDLE_SECONDS: Final = 30.0
"""Shorter than what servers and NAT tables allow a silent connection."""
_CHUNK: Final = 64 * 1024


class ExchangeError(Exception):
    """There is no answer. The text is ours alone, and holds nothing that the other side said."""


class NotTrustedError(ExchangeError):
    """The server showed a certificate that is not trusted, or is not for its name."""


class AnswerTooLargeError(ExchangeError):
    """The answer is longer than its operation allows."""


@dataclass(frozen=True, slots=True)
class Call:
    """What to ask."""

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(repr=False)
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, unread."""

    status: int
    body: bytes = field(repr=False)


class _Bounded:
    """Makes every operation of a socket end at `deadline` (of the monotonic clock)."""

    deadline = 0.0

    def recv_into(self, *args: object) -> int:
        self._limit()
        return super().recv_into(*args)  # type: ignore[misc, no-any-return]

    def send(self, *args: object) -> int:
        self._limit()
        return super().send(*args)  # type: ignore[misc, no-any-return]

    def sendall(self, *args: object) -> None:
        self._limit()
        super().sendall(*args)  # type: ignore[misc]

    def _limit(self) -> None:
        self.settimeout(_left(self.deadline))  # type: ignore[attr-defined]


class _Socket(_Bounded, socket.socket):
    """A plain socket with a deadline."""


class _TlsSocket(_Bounded, ssl.SSLSocket):
    """A TLS socket with a deadline."""


class _Connection(http.client.HTTPConnection):
    """An HTTP connection over a socket that we open."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport.host, transport.port)
        self._transport = transport
        self.deadline = 0.0
        self.idle_since = 0.0

    def connect(self) -> None:
        self.sock = self._transport.open_socket(self.deadline)

    def aim(self, deadline: float) -> None:
        """Bound what follows by `deadline`."""
        self.deadline = deadline
        if isinstance(self.sock, _Bounded):
            self.sock.deadline = deadline

    def is_fit(self) -> bool:
        """Say whether this idle connection may be used again."""
        if self.sock is None or time.monotonic() - self.idle_since > _IDLE_SECONDS:
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)  # Nothing is due, so what is there is the end of the connection.


class Transport:
    """Exchanges with one server. Thread-safe."""

    def __init__(self, *, host: str, port: int, tls: bool, ca_file: Path | None) -> None:
        self.host = host
        self.port = port
        self._tls = tls
        self._ca_file = ca_file
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []

    def exchange(self, call: Call, *, deadline: float) -> Answer:
        """Ask, and return the answer. `deadline` is of the monotonic clock.

        Raises `ExchangeError`, after which it is not known whether the call had an effect.
        """
        connection = self._take()
        try:
            connection.aim(deadline)
            connection.request(call.method, call.path, call.body, dict(call.headers))
            with connection.getresponse() as response:
                body = _read(response, call.max_bytes)
                complete = response.isclosed()
                answer = Answer(response.status, body)
        except TimeoutError:
            connection.close()
            msg = "it did not answer in time"
            raise ExchangeError(msg) from None
        except ssl.SSLError as error:
            connection.close()
            msg = f"TLS failed ({_tls_reason(error)})"
            kind = NotTrustedError if isinstance(error, ssl.SSLCertVerificationError) else ExchangeError
            raise kind(msg) from None
        except OSError as error:
            connection.close()
            msg = f"no connection ({error.strerror or type(error).__name__})"
            raise ExchangeError(msg) from None
        except (http.client.HTTPException, ValueError) as error:
            # Their texts quote what the other side sent, and that may be our own token.
            connection.close()
            msg = f"the answer is not HTTP ({type(error).__name__})"
            raise ExchangeError(msg) from None
        except BaseException:
            connection.close()
            raise
        self._give_back(connection, reusable=complete)
        return answer

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def open_socket(self, deadline: float) -> socket.socket:
        """Connect, and shake hands. Raises `OSError` or `ExchangeError`."""
        failure: OSError | None = None
        for family, kind, protocol, _, address in _resolve(self.host, self.port, deadline):
            plain = _Socket(family, kind, protocol)
            try:
                plain.settimeout(_left(deadline))
                plain.connect(address)
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connected: _Socket | _TlsSocket = plain
                if self._tls:
                    connected = self._shake_hands(plain, deadline)
            except OSError as error:
                plain.close()
                failure = error
            except BaseException:
                plain.close()
                raise
            else:
                connected.deadline = deadline
                return connected
        raise failure or OSError(0, "the name has no address")

    def _shake_hands(self, plain: _Socket, deadline: float) -> _TlsSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # Checks the chain and the name.
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = _TlsSocket
        if self._ca_file is not None:
            try:
                context.load_verify_locations(cafile=self._ca_file)
            except (OSError, ssl.SSLError) as error:
                msg = f"the CA file {self._ca_file} cannot be used ({_tls_reason(error)})"
                raise ExchangeError(msg) from None
        else:
            # The places built into OpenSSL. `load_default_certs` would let SSL_CERT_FILE of the environment decide.
            paths = ssl.get_default_verify_paths()
            if Path(paths.openssl_cafile).is_file():
                context.load_verify_locations(cafile=paths.openssl_cafile)
            if Path(paths.openssl_capath).is_dir():
                context.load_verify_locations(capath=paths.openssl_capath)
        plain.settimeout(_left(deadline))
        secured = context.wrap_socket(plain, server_hostname=self.host)
        if not isinstance(secured, _TlsSocket):  # `sslsocket_class` promises it; the deadline depends on it.
            msg = "TLS sockets of this Python cannot be bounded"
            raise ExchangeError(msg)
        return secured

    def _take(self) -> _Connection:
        """Return an idle connection that may be used again, or a new one."""
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return _Connection(self)
            if connection.is_fit():
                return connection
            connection.close()

    def _give_back(self, connection: _Connection, *, reusable: bool) -> None:
        connection.idle_since = time.monotonic()
        if reusable and connection.sock is not None:
            with self._lock:
                if len(self._idle) < _MAX_IDLE:
                    self._idle.append(connection)
                    return
        connection.close()


def _left(deadline: float) -> float:
    """Return the seconds that are left, or raise `TimeoutError`."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _read(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Return the whole body."""
    parts: list[bytes] = []
    total = 0
    while part := response.read(_CHUNK):
        parts.append(part)
        total += len(part)
        if total > max_bytes:
            msg = f"the answer is longer than {max_bytes} bytes"
            raise AnswerTooLargeError(msg)
    if response.length:  # What Content-Length said is still to come; `read` does not mind.
        msg = "the answer breaks off"
        raise ExchangeError(msg)
    return b"".join(parts)


def _resolve(host: str, port: int, deadline: float) -> list[tuple[Any, ...]]:
    """Return the addresses of `host`. The system's resolver knows no deadline, so it works in a thread of its own."""
    found: queue.SimpleQueue[list[Any] | OSError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            found.put(error)

    threading.Thread(target=look_up, name="carnet-resolve", daemon=True).start()
    try:
        answer = found.get(timeout=_left(deadline))
    except queue.Empty:
        msg = f"the name {host} was not resolved in time"
        raise ExchangeError(msg) from None
    if isinstance(answer, OSError):
        msg = f"the name {host} is not known ({answer.strerror})"
        raise ExchangeError(msg)
    return answer


def _tls_reason(error: OSError) -> str:
    """Return why, in OpenSSL's own words and none of the other side's."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or "no reason given").lower().replace("_", " ")
    return error.strerror or type(error).__name__
