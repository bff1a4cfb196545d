"""The first message of a TLS 1.2 client, by hand: to offer what no TLS library of today offers any more."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress

__all__ = ["answer_to_client_hello", "client_hello"]

_HANDSHAKE = 0x16


def client_hello(server_name: str, suites: Iterable[int], *, compression: bytes = b"\x00") -> bytes:
    """Return a record with a ClientHello (RFC 5246 section 7.4.1.2) that offers `suites` and nothing else."""
    name = server_name.encode()
    extensions = b"".join(
        struct.pack(">HH", kind, len(content)) + content
        for kind, content in (
            (0, struct.pack(">HBH", len(name) + 3, 0, len(name)) + name),
            (10, b"\x00\x04\x00\x17\x00\x1d"),  # supported groups: secp256r1, x25519
            (11, b"\x01\x00"),  # point formats: uncompressed
            (13, b"\x00\x0e\x04\x03\x05\x03\x06\x03\x04\x01\x05\x01\x02\x03\x02\x01"),  # signature algorithms
        )
    )
    offered = b"".join(struct.pack(">H", suite) for suite in suites)
    body = (
        b"\x03\x03"
        + os.urandom(32)
        + b"\x00"  # no session
        + struct.pack(">H", len(offered))
        + offered
        + bytes([len(compression)])
        + compression
        + struct.pack(">H", len(extensions))
        + extensions
    )
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return bytes([_HANDSHAKE]) + b"\x03\x01" + struct.pack(">H", len(message)) + message


def answer_to_client_hello(address: str, hello: bytes) -> tuple[int, int] | None:
    """Send `hello`, and return the suite and the compression that the server chose; None where it ends there."""
    host, _, port = address.rpartition(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection, suppress(ConnectionError):
        connection.sendall(hello)
        while len(answer) < 5 + 4 + 38 and (chunk := connection.recv(4096)):
            answer += chunk
    if answer[:1] != bytes([_HANDSHAKE]):
        return None
    # Record and message heads, version and random; then the session id, whose length is the byte before it.
    chosen = answer[5 + 4 + 34 :]
    suite, compression = struct.unpack(">HB", chosen[1 + chosen[0] : 4 + chosen[0]])
    return suite, compression
