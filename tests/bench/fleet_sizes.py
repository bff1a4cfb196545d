"""How large the messages of the trust stream are: the real ones, serialised, with what goes around them on the wire."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Final

from carnet.jwk import KeySet
from carnet.revocations import GENESIS_DIGEST, Position, Revocation, RevocationKind, next_digest
from carnet.trust_messages import Answer, Hello
from carnet.trust_wire import request_message
from carnet.v1 import trust_pb2
from carnet_broker.core.watching import Change, Push, in_parts
from carnet_broker.edges.grpc.trust_messages import change_message, position_message
from carnet_broker.ports import LogPosition
from support.keyrings import ISSUER, T0, jwk

__all__ = ["changes", "message_sizes", "on_the_wire"]

HEARTBEAT: Final = timedelta(seconds=15)
MAX_AGE: Final = timedelta(minutes=5)
STALENESS: Final = timedelta(minutes=5)
EPOCH: Final = 1_800_000_000_000
"""Milliseconds since 1970, as the first epoch of a store is."""
VERSION: Final = 1_000_000
ANSWERS: Final = 1_000
"""Answers given on this stream so far: what a number takes grows with it."""

FRAME: Final = 9
"""Header of a frame (RFC 9113 section 4.1)."""
RECORD: Final = 22
"""What TLS 1.3 adds to a record: header, content type and tag (RFC 8446 section 5.2)."""
LARGEST_FRAME: Final = 16_384
SEGMENT: Final = 1_448
SEGMENT_HEADERS: Final = 52
"""IPv4 (20) and TCP with time stamps (32)."""


def message_sizes() -> dict[str, int]:
    """Return the bytes of each message, as protobuf, without gRPC's and HTTP/2's framing."""
    position = Position(EPOCH, 42, VERSION, bytes(range(32)))
    hello = Hello("0" * 22, "payments", position, STALENESS, accepts_stale=False)
    sizes = {
        "heartbeat": _response(Push(position)),
        "key_set_of_3": _response(Push(position, key_set=True)),
        "answer": request_message(Answer(ANSWERS, position)).ByteSize(),
        "hello": request_message(hello).ByteSize(),
    }
    for count in (1, 100):
        sizes[f"delta_of_{count}"] = sum(changes(count, snapshot=False))
    sizes["snapshot_of_10000"] = sum(changes(10_000, snapshot=True))
    sizes["parts_of_snapshot_of_10000"] = len(changes(10_000, snapshot=True))
    return sizes


def changes(count: int, *, snapshot: bool) -> list[int]:
    """Return the bytes of each response of a change of `count` revoked tokens."""
    entries = []
    digest = GENESIS_DIGEST
    for version in range(VERSION + 1, VERSION + count + 1):
        entry = Revocation(version, RevocationKind.TOKEN, f"{version:022d}", 0, T0 + timedelta(hours=1))
        digest = next_digest(digest, entry)
        entries.append(entry)
    to = LogPosition(EPOCH, VERSION + count, digest)
    position = Position(to.epoch, 42, to.version, to.digest)
    parts = in_parts(entries)
    return [
        _response(Push(position, change=Change(0 if snapshot else VERSION, to, snapshot, number < len(parts), part)))
        for number, part in enumerate(parts, start=1)
    ]


def on_the_wire(size: int, around: float) -> float:
    """Return the bytes of a message of `size` bytes on the network.

    `around` is what was measured to go around a small message; a large one takes more frames and more segments.
    """
    more_frames = (size // LARGEST_FRAME) * (FRAME + RECORD)
    passed = size + around + more_frames
    return passed + math.ceil(passed / SEGMENT) * SEGMENT_HEADERS


def _response(push: Push) -> int:
    """Return the size of a response as `edges.grpc.watch` writes it."""
    message = trust_pb2.WatchResponse(answered=ANSWERS, live=True, position=position_message(push.position))
    message.age.FromTimedelta(timedelta(milliseconds=437))
    message.heartbeat.FromTimedelta(HEARTBEAT)
    if push.key_set:
        message.key_set.issuer = ISSUER
        message.key_set.generation = push.position.generation
        message.key_set.jwks = KeySet.of(map(jwk, range(3))).to_json()
        message.key_set.max_age.FromTimedelta(MAX_AGE)
        message.key_set.age.FromTimedelta(timedelta(milliseconds=437))
    if push.change is not None:
        message.change.CopyFrom(change_message(push.change))
    return message.ByteSize()
