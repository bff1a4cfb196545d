"""HTTP/2 by hand over TLS: every frame that a broken or a hostile client can send, and what the server makes of it.

Frames are those of RFC 9113, header blocks those of RFC 7541. No rule is kept for the sender. `Connection` is for one
thread; it takes in what the server sends also while it sends itself, so that neither side waits for the other.
"""

from __future__ import annotations

import base64
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import grpc
import hpack
from google.rpc import error_details_pb2, status_pb2

__all__ = [
    "ACK",
    "END_HEADERS",
    "END_STREAM",
    "PADDED",
    "PREFACE",
    "Answer",
    "Connection",
    "ConnectionEndedError",
    "FrameType",
    "connect",
    "data_frames",
    "frame",
    "grpc_message",
    "grpc_status_of_call",
    "header_block",
    "header_frames",
    "hpack_integer",
    "literal",
    "request_headers",
    "settings",
    "tls_connection",
]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_READ_BYTES: Final = 65_536
_FRAME: Final = 16_384
"""Bytes of a frame that every receiver takes (RFC 9113 section 4.2)."""
_TIMEOUT: Final = 10.0


class FrameType(IntEnum):
    """The types of frames (RFC 9113 section 6)."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0, length: int | None = None) -> bytes:
    """Return one frame. `length` is what it says of its payload, where that is to be a lie."""
    said = len(payload) if length is None else length
    return said.to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def settings(values: Mapping[int, int]) -> bytes:
    """Return a SETTINGS frame (RFC 9113 section 6.5): identifiers and values."""
    return frame(FrameType.SETTINGS, b"".join(struct.pack(">HI", *item) for item in values.items()))


def grpc_message(content: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """Return a message as gRPC puts it into DATA. `length` is what it says of its content."""
    return struct.pack(">BI", compressed, len(content) if length is None else length) + content


def literal(name: bytes, value: bytes) -> bytes:
    """Return a header field that is spelled out and not remembered (RFC 7541 section 6.2.2), whatever its bytes."""
    return b"\x00" + _string(name) + _string(value)


def header_block(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return header fields, each as a `literal`."""
    return b"".join(literal(name, value) for name, value in fields)


def request_headers(method: str | bytes, *more: tuple[bytes, bytes]) -> bytes:
    """Return the header block of a gRPC request. A name in `more` that is a usual one takes its place."""
    path = method if isinstance(method, bytes) else method.encode()
    usual = {
        b":method": b"POST",
        b":scheme": b"https",
        b":path": path,
        b":authority": b"test",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
    }
    replaced = {name for name, _ in more}
    # Pseudo-header fields come before the others (RFC 9113 section 8.3).
    fields = [(name, value) for name, value in usual.items() if name not in replaced] + list(more)
    return header_block(sorted(fields, key=lambda one: not one[0].startswith(b":")))


def header_frames(block: bytes, stream: int) -> list[bytes]:
    """Return HEADERS and as many CONTINUATION as `block` needs. Nothing may be sent between them."""
    parts = _parts(block)
    last = len(parts) - 1
    return [
        frame(
            FrameType.CONTINUATION if number else FrameType.HEADERS,
            part,
            flags=END_HEADERS if number == last else 0,
            stream=stream,
        )
        for number, part in enumerate(parts)
    ]


def data_frames(content: bytes, stream: int) -> list[bytes]:
    """Return as many DATA as `content` needs, the last of which ends the stream."""
    parts = _parts(content)
    last = len(parts) - 1
    return [
        frame(FrameType.DATA, part, flags=END_STREAM if number == last else 0, stream=stream)
        for number, part in enumerate(parts)
    ]


def _parts(content: bytes) -> list[bytes]:
    return [content[at : at + _FRAME] for at in range(0, len(content), _FRAME)] or [b""]


def _string(content: bytes) -> bytes:
    return hpack_integer(len(content), 7) + content


def hpack_integer(value: int, prefix_bits: int, *, first: int = 0) -> bytes:
    """Return an HPACK integer (RFC 7541 section 5.1); `first` has the bits before its prefix."""
    most = (1 << prefix_bits) - 1
    if value < most:
        return bytes([first | value])
    encoded = bytes([first | most])
    value -= most
    while value >= 0x80:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


class ConnectionEndedError(ConnectionError):
    """The server ended the connection; `code` and `text` are those of its GOAWAY, None and empty without one."""

    def __init__(self, code: int | None, text: bytes) -> None:
        super().__init__(f"the server ended the connection (GOAWAY {code}: {text!r})")
        self.code = code
        self.text = text


@dataclass
class Answer:
    """What the server sent on one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    """Headers and trailers."""
    data: bytes = b""
    reset: int | None = None
    """The code of RST_STREAM."""
    ended: bool = False

    @property
    def status(self) -> grpc.StatusCode | None:
        """The gRPC status; None where the stream was reset without one."""
        found = self.headers.get("grpc-status")
        return None if found is None else _CODES[int(found)]

    @property
    def reason(self) -> str | None:
        """The reason in google.rpc.ErrorInfo; None without one."""
        packed = self.headers.get("grpc-status-details-bin")
        if packed is None:
            return None
        info = error_details_pb2.ErrorInfo()
        details = status_pb2.Status.FromString(base64.b64decode(packed + "=" * (-len(packed) % 4))).details
        assert any(detail.Unpack(info) for detail in details), f"no ErrorInfo: {details}"
        assert info.domain == "carnet"
        return str(info.reason)

    @property
    def message(self) -> bytes:
        """The one message, without its prefix."""
        assert len(self.data) - 5 == struct.unpack(">I", self.data[1:5])[0], "not one whole message"
        return self.data[5:]


class Connection:
    """One HTTP/2 connection, after the TLS handshake. Use `connect`."""

    def __init__(self, secured: ssl.SSLSocket) -> None:
        secured.setblocking(False)  # noqa: FBT003 - the socket's own signature
        self.tls = secured
        self.goaway: tuple[int, bytes] | None = None
        self.pings_answered = 0
        self.settings_acknowledged = 0
        self.server_settings: dict[int, int] = {}
        self.ended = False
        self._decoder = hpack.Decoder()
        self._received = b""
        self._replies = b""
        self._block: tuple[int, int, bytes] | None = None
        self.answers: dict[int, Answer] = {}
        """What came so far, by stream."""
        self._next_stream = 1

    def next_stream(self) -> int:
        """Return the id of a new stream of ours."""
        self._next_stream += 2
        return self._next_stream - 2

    def send(self, *frames: bytes, timeout: float = _TIMEOUT) -> None:
        """Send all of `frames`. Raises `ConnectionEndedError`, or `TimeoutError` where the server does not read."""
        replies, self._replies = self._replies, b""
        view = memoryview(b"".join((replies, *frames)))
        deadline = time.monotonic() + timeout
        while view:
            if self.ended:
                raise self._end()
            try:
                view = view[self.tls.send(view[: 4 * _FRAME]) :]
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._wait(deadline, writing=True)
            except OSError as error:
                self._drain()
                raise self._end() from error
            self._drain()

    def answer(self, stream: int, *, timeout: float = _TIMEOUT) -> Answer:
        """Return what the server said on `stream`, once it has ended it. Raises as `send` does."""
        deadline = time.monotonic() + timeout
        while stream not in self.answers or not self.answers[stream].ended:
            if self.ended:
                raise self._end()
            self._take_in_more(deadline)
        return self.answers[stream]

    def call(
        self, method: str | bytes, message: bytes, *more: tuple[bytes, bytes], timeout: float = _TIMEOUT
    ) -> Answer:
        """Make a unary call with a serialised message and more headers."""
        stream = self.next_stream()
        self.send(*header_frames(request_headers(method, *more), stream), *data_frames(grpc_message(message), stream))
        return self.answer(stream, timeout=timeout)

    def wait_until_ended(self, *, timeout: float = _TIMEOUT) -> None:
        """Return when the server has ended the connection. Raises `TimeoutError`."""
        deadline = time.monotonic() + timeout
        while not self.ended:
            self._take_in_more(deadline)

    def take_in(self, seconds: float) -> None:
        """Take in what the server sends in the next `seconds`, or until it ends the connection."""
        with suppress(TimeoutError):
            self.wait_until_ended(timeout=seconds)

    def _end(self) -> ConnectionEndedError:
        self.ended = True
        return ConnectionEndedError(*(self.goaway or (None, b"")))

    def _wait(self, deadline: float, *, writing: bool = False) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or not any(select.select([self.tls], [self.tls] if writing else [], [], left)):
            msg = "the server is silent"
            raise TimeoutError(msg)

    def _take_in_more(self, deadline: float) -> None:
        """Wait until there is something, take it in, and reply to it. Raises `TimeoutError`."""
        self._wait(deadline)
        self._drain()
        if self._replies and not self.ended:
            with suppress(ConnectionEndedError):  # `ended` says so.
                self.send()

    def _drain(self) -> None:
        """Take in all that is there."""
        while not self.ended:
            try:
                chunk = self.tls.recv(_READ_BYTES)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except OSError:
                chunk = b""
            self.ended = not chunk
            self._received += chunk
        while len(self._received) >= 9:
            length = int.from_bytes(self._received[:3], "big")
            if len(self._received) < 9 + length:
                break
            head, payload = self._received[:9], self._received[9 : 9 + length]
            self._received = self._received[9 + length :]
            self._take(head[3], head[4], int.from_bytes(head[5:], "big"), payload)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        answer = self.answers.setdefault(stream, Answer())
        match kind:
            case FrameType.DATA:
                answer.data += payload
                answer.ended |= bool(flags & END_STREAM)
            case FrameType.HEADERS | FrameType.CONTINUATION:
                begun = self._block if kind == FrameType.CONTINUATION else None
                _, first_flags, block = begun or (stream, flags, b"")
                self._block = (stream, first_flags, block + payload)
                if flags & END_HEADERS:
                    fields = self._decoder.decode(block + payload)
                    answer.headers.update((str(name), str(value)) for name, value in fields)
                    answer.ended |= bool(first_flags & END_STREAM)
            case FrameType.RST_STREAM:
                answer.reset, answer.ended = int.from_bytes(payload, "big"), True
            case FrameType.GOAWAY:
                self.goaway = (int.from_bytes(payload[4:8], "big"), payload[8:])
            case FrameType.PING if flags & ACK:
                self.pings_answered += 1
            case FrameType.SETTINGS if flags & ACK:
                self.settings_acknowledged += 1
            case FrameType.SETTINGS:
                self.server_settings.update(struct.iter_unpack(">HI", payload))
                self._replies += frame(FrameType.SETTINGS, flags=ACK)
            case FrameType.PING:
                self._replies += frame(FrameType.PING, payload, flags=ACK)


@contextmanager
def tls_connection(
    address: str, context: ssl.SSLContext, *, server_name: str, session: ssl.SSLSession | None = None
) -> Iterator[ssl.SSLSocket]:
    """Open a TLS connection with ``h2``. Raises `ssl.SSLError` or `OSError` where the handshake fails."""
    host, _, port = address.rpartition(":")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=_TIMEOUT) as plain,
        context.wrap_socket(plain, server_hostname=server_name, session=session) as secured,
    ):
        yield secured


@contextmanager
def connect(
    address: str, context: ssl.SSLContext, *, server_name: str, own_settings: bytes = settings({})
) -> Iterator[Connection]:
    """Open a connection and say hello. Raises `ssl.SSLError` or `OSError` where the handshake fails."""
    with tls_connection(address, context, server_name=server_name) as secured:
        connection = Connection(secured)
        connection.send(PREFACE, own_settings)
        yield connection


def grpc_status_of_call(secured: ssl.SSLSocket, method: str, request: bytes = b"") -> int:
    """Make one unary call on a new TLS connection, and return its gRPC status code.

    Raises `ConnectionEndedError` where the server ends the connection first: with TLS 1.3 a client hears only then that
    its certificate is refused.
    """
    connection = Connection(secured)
    connection.send(PREFACE, settings({}))
    status = connection.call(method, request).status
    assert status is not None, "the stream was reset"
    code: int = status.value[0]
    return code
