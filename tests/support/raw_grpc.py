"""One gRPC call over any TLS connection, for what grpcio's own client cannot do: TLS versions, kinds of keys, tickets.

As much of HTTP/2 (RFC 9113) and HPACK (RFC 7541) as one unary call on a fresh connection needs.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["grpc_status_of_call", "tls_connection"]

_DATA, _HEADERS, _SETTINGS, _GOAWAY, _CONTINUATION = 0, 1, 4, 7, 9
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
# A literal of the first response of a connection refers to nothing that came before; gRPC does not Huffman-code it.
_STATUS: Final = re.compile(rb"grpc-status[\x01-\x02]([0-9]{1,2})")


@contextmanager
def tls_connection(
    address: str, context: ssl.SSLContext, *, server_name: str, session: ssl.SSLSession | None = None
) -> Iterator[ssl.SSLSocket]:
    """Open a TLS connection with ``h2``. Raises `ssl.SSLError` or `OSError` where the handshake fails."""
    host, _, port = address.rpartition(":")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=server_name, session=session) as connection,
    ):
        yield connection


def grpc_status_of_call(connection: ssl.SSLSocket, method: str, request: bytes = b"") -> int:
    """Make one unary call, and return its gRPC status code.

    Raises `ssl.SSLError` or `ConnectionError` where the server ends the connection first: with TLS 1.3 a client hears
    only then that its certificate is refused.
    """
    headers = b"".join(
        b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value  # RFC 7541 section 6.2.2: literal, new name.
        for name, value in (
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", method.encode()),
            (b":authority", b"test"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
    )
    message = b"\x00" + struct.pack(">I", len(request)) + request
    connection.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, 1, headers)
        + _frame(_DATA, _END_STREAM, 1, message)
    )
    block = b""
    while True:
        kind, flags, payload = _read_frame(connection)
        if kind == _SETTINGS and not flags & _ACK:
            connection.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind in (_HEADERS, _CONTINUATION):
            block += payload
        elif kind == _GOAWAY:
            msg = f"the server said GOAWAY: {payload[8:]!r}"
            raise ConnectionError(msg)
        status = _STATUS.search(block)
        if status is not None:
            return int(status[1])


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _read_frame(connection: ssl.SSLSocket) -> tuple[int, int, bytes]:
    head = _read(connection, 9)
    return head[3], head[4], _read(connection, int.from_bytes(head[:3], "big"))


def _read(connection: ssl.SSLSocket, count: int) -> bytes:
    content = b""
    while len(content) < count:
        chunk = connection.recv(count - len(content))
        if not chunk:
            msg = "the server closed the connection"
            raise ConnectionError(msg)
        content += chunk
    return content
