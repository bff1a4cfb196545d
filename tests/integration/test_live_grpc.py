"""What a hostile client can do with HTTP/2 and gRPC, against a running broker (rows G01 to G12 and G14).

The attackers have a certificate of a workload: without one no frame is ever read. They may ask for tokens, so that a
call that should not be served would show.
"""

from __future__ import annotations

import contextlib
import gzip
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest
from google.protobuf import duration_pb2

from carnet.v1 import token_pb2
from support.attacks import (
    ISSUE_TOKEN,
    REQUEST,
    TWO_CALLERS,
    call_with,
    connected,
    others_go_on,
    outcome,
    processor_time,
)
from support.http2 import (
    ACK,
    END_HEADERS,
    END_STREAM,
    PADDED,
    ConnectionEndedError,
    FrameType,
    frame,
    grpc_message,
    header_block,
    hpack_integer,
    literal,
    request_headers,
    settings,
)
from support.running_broker import OUTSIDER, RunningBroker, start_broker
from support.vault import prepare

MESSAGE_LIMIT = 64 * 1024
OK, INTERNAL, EXHAUSTED = grpc.StatusCode.OK, grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
SLOW = (grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW_REQUEST")
INITIAL_WINDOW_SIZE = 4


@pytest.fixture(name="broker", scope="module")
def _broker(openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    directory = tmp_path_factory.mktemp("broker")
    place = prepare(openbao, directory / "login")
    limits = {"tokens_per_second": 5000, "token_burst": 5000, "read_within": "1500ms"}
    with start_broker(place, directory / "broker", policy=TWO_CALLERS, settings={"limits": limits}) as running:
        yield running
    place.close()


# -- G01 to G04: floods of headers -------------------------------------------------------------------------------------


def test_g01_streams_that_are_reset_as_soon_as_they_begin(broker):
    """10,000 on one connection (CVE-2023-44487): they cost the broker little, and others nothing."""
    cancel = struct.pack(">I", 8)
    with others_go_on(broker), connected(broker, OUTSIDER) as connection:
        before = processor_time(broker)
        with contextlib.suppress(ConnectionEndedError):
            for _ in range(200):
                frames = []
                for _ in range(50):
                    stream = connection.next_stream()
                    frames.append(
                        frame(FrameType.HEADERS, request_headers(ISSUE_TOKEN), flags=END_HEADERS, stream=stream)
                    )
                    frames.append(frame(FrameType.RST_STREAM, cancel, stream=stream))
                connection.send(*frames)
            connection.take_in(0.2)
        assert processor_time(broker) - before < 10


@pytest.mark.parametrize(("count", "size"), [(4096, 16_384), (10_000, 0), (10_000, 1)], ids=["64 MB", "empty", "tiny"])
def test_g02_headers_that_never_end(broker, count, size):
    """CONTINUATION without END: what is over the limit is thrown away or the connection ended, memory stays."""
    part = literal(b"x-filler", b"v" * (size - 12)) if size > 12 else b"\x00" * size
    with others_go_on(broker), connected(broker, OUTSIDER) as connection:
        stream = connection.next_stream()
        connection.send(frame(FrameType.HEADERS, request_headers(ISSUE_TOKEN), stream=stream))
        with contextlib.suppress(ConnectionEndedError):
            for _ in range(count // 64):
                connection.send(*[frame(FrameType.CONTINUATION, part, stream=stream)] * 64)
            connection.take_in(0.2)


BIG_ENTRY = b"\x40" + hpack_integer(5, 7) + b"x-big" + hpack_integer(3900, 7) + b"v" * 3900
G03_CASES: dict[str, bytes] = {
    "a 4 KB entry 4,000 times": request_headers(ISSUE_TOKEN) + BIG_ENTRY + b"\xbe" * 4000,
    "table of a gigabyte": hpack_integer(1 << 30, 5, first=0x20) + request_headers(ISSUE_TOKEN),
    "4,000 table sizes": b"\x20\x3f\xe1\x1f" * 4000 + request_headers(ISSUE_TOKEN),
    "string of 2 GB": request_headers(ISSUE_TOKEN) + b"\x00" + hpack_integer(1 << 31, 7) + b"x" * 100,
    "number with leading zeros": request_headers(ISSUE_TOKEN) + b"\x00\x7f" + b"\x80" * 10_000 + b"\x00",
    "number that overflows": request_headers(ISSUE_TOKEN) + b"\x00\x7f" + b"\xff" * 9 + b"\x7f",
    "index that is not there": request_headers(ISSUE_TOKEN) + b"\xff\xff\xff\xff\x07",
    "index zero": request_headers(ISSUE_TOKEN) + b"\x80",
    "Huffman padding that is no padding": request_headers(ISSUE_TOKEN) + b"\x00\x81\x00\x81\x00",
    "cut off": request_headers(ISSUE_TOKEN)[:-3],
    "names of no bytes": request_headers(ISSUE_TOKEN) + literal(b"", b"x") * 100,
}


@pytest.mark.parametrize("block", G03_CASES.values(), ids=G03_CASES)
def test_g03_header_blocks_that_are_bombs_or_broken(broker, block):
    """gRPC refuses the call or the connection, without our code; others do not notice."""
    with others_go_on(broker, growth=20 << 20):
        assert outcome(call_with(broker, grpc_message(REQUEST), headers=block)) in (
            (None, None),
            (INTERNAL, None),
            (EXHAUSTED, None),
        )


def test_g03_the_same_bomb_on_many_streams_of_a_connection(broker):
    """The entry is remembered once and named 12,000 times on each of 200 streams."""
    with others_go_on(broker), connected(broker, OUTSIDER) as connection, contextlib.suppress(ConnectionEndedError):
        for number in range(200):
            block = request_headers(ISSUE_TOKEN) + (b"\xbe" * 12_000 if number else BIG_ENTRY)
            connection.send(
                frame(FrameType.HEADERS, block, flags=END_HEADERS | END_STREAM, stream=connection.next_stream())
            )
        connection.take_in(0.3)


G04_REFUSED: dict[str, tuple[bytes, bytes]] = {
    "te is something else": (b"te", b"x"),
    "te of 9 KB": (b"te", b"t" * 9000),
    "scheme is no scheme": (b":scheme", b"\xff\x00"),
    "scheme of 9 KB": (b":scheme", b"s" * 9000),
    "method is GET": (b":method", b"GET"),
    "method of 9 KB": (b":method", b"P" * 9000),
    "key in capitals": (b"X-Upper", b"v"),
    "key with a space": (b"a b", b"v"),
    "key of other bytes": (b"\xc3\xa9", b"v"),
    "-bin is no base64": (b"x-bin", b"!!!"),
    "timeout is no time": (b"grpc-timeout", b"xx"),
    "timeout is negative": (b"grpc-timeout", b"-1S"),
    "encoding is unknown": (b"grpc-encoding", b"zip"),
}


@pytest.mark.parametrize("header", G04_REFUSED.values(), ids=G04_REFUSED)
def test_g04_g05_headers_that_grpc_refuses(broker, header):
    """No token, no crash (CVE-2023-1428), and no word of ours in the answer."""
    answer = call_with(broker, grpc_message(REQUEST), headers=request_headers(ISSUE_TOKEN, header))
    assert outcome(answer) in ((None, None), (INTERNAL, None))
    assert b"" == (answer.data if answer else b"")
    assert broker.issue("payments").token


G05_HARMLESS: dict[str, tuple[tuple[bytes, bytes], ...]] = {
    "two authorization values": ((b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")),
    "a reserved key": ((b"grpc-status", b"0"), (b"grpc-message", b"hello"), (b"grpc-nothing", b"v")),
    "a value of other bytes": ((b"x-value", b"\xff\xfe\x00\r\n\x1b[31m"),),
    "connection and content-length": ((b"connection", b"close"), (b"content-length", b"99999999999")),
    "a long time": ((b"grpc-timeout", b"99999999H"),),
}


@pytest.mark.parametrize("headers", G05_HARMLESS.values(), ids=G05_HARMLESS)
def test_g05_headers_that_change_nothing(broker, headers):
    """The twin: what the broker does not look at, it does not trip over either."""
    answer = call_with(broker, grpc_message(REQUEST), headers=request_headers(ISSUE_TOKEN, *headers))
    assert (OK, None) == outcome(answer)


@pytest.mark.parametrize("kib", [8, 12, 15])
def test_g05_metadata_up_to_16_kib_is_taken(broker, kib):
    """One value of that size, less what the rest of the headers takes."""
    block = request_headers(ISSUE_TOKEN) + literal(b"x-filler", b"v" * (kib * 1024 - 400))
    assert (OK, None) == outcome(call_with(broker, grpc_message(REQUEST), headers=block))


TOO_MUCH_METADATA: dict[str, bytes] = {
    "a value of 17 KiB": literal(b"x-filler", b"v" * 17 * 1024),
    "a value of 1 MiB": literal(b"x-filler", b"v" * 1024 * 1024),
    "ten values of 2 KiB": literal(b"x-filler", b"v" * 2048) * 10,
    "10,000 keys": header_block((f"k{number}".encode(), b"v") for number in range(10_000)),
}


@pytest.mark.parametrize("metadata", TOO_MUCH_METADATA.values(), ids=TOO_MUCH_METADATA)
def test_g05_more_metadata_is_dropped(broker, metadata):
    """gRPC throws it away, and refuses the call unless it was answered before that; it is never held in memory."""
    with others_go_on(broker, growth=10 << 20):
        for _ in range(3):
            answer = call_with(broker, grpc_message(REQUEST), headers=request_headers(ISSUE_TOKEN) + metadata)
            assert outcome(answer) in ((EXHAUSTED, None), (OK, None), (None, None))


# -- G06, G07: messages ------------------------------------------------------------------------------------------------


def request_of(size: int) -> bytes:
    """Return a request that is exactly `size` bytes long, of one long audience."""
    request = token_pb2.IssueTokenRequest(audience="a" * (size - 4)).SerializeToString()
    assert size == len(request)
    return request


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (grpc_message(bytes(1000), length=4 << 20), (EXHAUSTED, None)),
        (grpc_message(REQUEST, length=2**32 - 1), (EXHAUSTED, None)),
        (grpc_message(REQUEST, length=len(REQUEST) + 1), SLOW),
        (grpc_message(REQUEST, length=len(REQUEST) - 1), INVALID),
        (b"\x00\x00\x00", SLOW),
        (b"", SLOW),
        (grpc_message(REQUEST) * 2, (OK, None)),
        (grpc_message(REQUEST) * 1000, (OK, None)),
    ],
    ids=[
        "4 MiB", "length of 4 GB", "length one too long", "length one too short", "half a prefix", "no message",
        "two messages", "1,000 messages",
    ],
)  # fmt: skip
def test_g06_messages_of_all_lengths(broker, message, expected):
    """Over 64 KiB it is refused by its prefix; a call that ends before its message is told so."""
    with others_go_on(broker, growth=20 << 20):
        assert expected == outcome(call_with(broker, message))


def test_g06_a_message_of_64_kib_is_read_and_one_more_byte_is_not(broker):
    """The limit to the byte, with a client that keeps to the window that it is given."""
    with broker.channel() as channel:
        ask = channel.unary_unary(ISSUE_TOKEN)
        for message, code in ((request_of(MESSAGE_LIMIT), INVALID[0]), (request_of(MESSAGE_LIMIT + 1), EXHAUSTED)):
            with pytest.raises(grpc.RpcError) as caught:
                ask(message, timeout=5)
            assert code is caught.value.code()


BOMB = bytes(60 << 20)
PACKED_BOMB = gzip.compress(BOMB)


@pytest.mark.parametrize(
    ("message", "encoding", "expected"),
    [
        (gzip.compress(REQUEST), b"gzip", (OK, None)),
        (PACKED_BOMB, b"gzip", (EXHAUSTED, None)),
        (zlib.compress(BOMB), b"deflate", (EXHAUSTED, None)),
        (gzip.compress(request_of(MESSAGE_LIMIT) + b"a" * 1000), b"gzip", (EXHAUSTED, None)),
        (gzip.compress(request_of(MESSAGE_LIMIT)), b"gzip", INVALID),
        (b"\x1f\x8b no gzip", b"gzip", (INTERNAL, None)),
        (gzip.compress(REQUEST)[:-6], b"gzip", (INTERNAL, None)),
        (gzip.compress(REQUEST), None, (INTERNAL, None)),
    ],
    ids=[
        "small", "gzip bomb 1:1000", "deflate bomb", "a little too large", "exactly as large", "no gzip", "cut off",
        "flag without an encoding",
    ],
)  # fmt: skip
def test_g06_compressed_messages_count_as_what_they_become(broker, message, encoding, expected):
    """60 MB in 60 KB are never unpacked whole."""
    assert len(message) <= MESSAGE_LIMIT
    more = [] if encoding is None else [(b"grpc-encoding", encoding)]
    headers = request_headers(ISSUE_TOKEN, *more)
    with others_go_on(broker, growth=20 << 20):
        assert expected == outcome(call_with(broker, grpc_message(message, compressed=True), headers=headers))


def test_g06_twenty_bombs_at_once(broker):
    """Memory does not grow with them."""
    headers = request_headers(ISSUE_TOKEN, (b"grpc-encoding", b"gzip"))
    with others_go_on(broker), ThreadPoolExecutor(20) as pool:
        answers = pool.map(
            lambda _: call_with(broker, grpc_message(PACKED_BOMB, compressed=True), headers=headers), range(20)
        )
        assert {(EXHAUSTED, None)} == {outcome(answer) for answer in answers}


def nested_groups(depth: int) -> bytes:
    """Return groups in groups in an unknown field, which a parser has to follow to their end."""
    return b"\x0b" * depth + b"\x0c" * depth


def request_with_ttl(seconds: int, nanos: int = 0) -> bytes:
    """Return a request with a life that no Duration may have."""
    life = duration_pb2.Duration(seconds=seconds, nanos=nanos)
    return token_pb2.IssueTokenRequest(audience="payments", ttl=life).SerializeToString()


G07_CASES: dict[str, bytes] = {
    "groups 20,000 deep": nested_groups(20_000),
    "20,000 scopes": token_pb2.IssueTokenRequest(audience="payments", scopes=["a"] * 20_000).SerializeToString(),
    "a string that is no UTF-8": b"\x0a\x04\xff\xfe\xfd\xfc",
    "a field that is cut off": b"\x0a\x7fabc",
    "a wire type that is none": b"\x0f\x01",
    "field number zero": b"\x02\x01a",
    "a length of 2^64": b"\x0a" + b"\xff" * 9 + b"\x01",
    "noise": bytes(range(255, 0, -1)) * 8,
    "a life below zero": request_with_ttl(-1),
    "a life of all seconds": request_with_ttl(2**63 - 1),
    "a life with nanoseconds below zero": request_with_ttl(60, -1),
    "a life with too many nanoseconds": request_with_ttl(60, 2**31 - 1),
    "the audience twice, the last one bad": REQUEST + b"\x0a\x03a b",
    "an audience with a NUL": b"\x0a\x09payments\x00",
}


@pytest.mark.parametrize("message", G07_CASES.values(), ids=G07_CASES)
def test_g07_messages_that_make_no_sense_are_bad_requests(broker, message):
    """INVALID_ARGUMENT, never an internal error: it is the caller's fault, and no alarm of ours."""
    assert INVALID == outcome(call_with(broker, grpc_message(message)))
    assert broker.issue("payments").token


def test_g07_unknown_fields_are_skipped(broker):
    """The twin: a newer client's field changes nothing."""
    assert (OK, None) == outcome(call_with(broker, grpc_message(REQUEST + b"\xfa\x3f\x03abc")))


# -- G08: floods of other frames ---------------------------------------------------------------------------------------

G08_FLOODS: dict[str, bytes] = {
    "PING": frame(FrameType.PING, b"12345678"),
    "SETTINGS": settings({INITIAL_WINDOW_SIZE: 65_535}),
    "SETTINGS that change windows": settings({INITIAL_WINDOW_SIZE: 2**31 - 1}) + settings({INITIAL_WINDOW_SIZE: 0}),
    "SETTINGS acknowledged": frame(FrameType.SETTINGS, flags=ACK),
    "PRIORITY": frame(FrameType.PRIORITY, b"\x00\x00\x00\x00\x10", stream=1),
    "PRIORITY of other streams": frame(FrameType.PRIORITY, b"\x00\x00\x00\x03\x10", stream=99_999),
    "WINDOW_UPDATE by one": frame(FrameType.WINDOW_UPDATE, struct.pack(">I", 1)),
    "WINDOW_UPDATE by nothing": frame(FrameType.WINDOW_UPDATE, struct.pack(">I", 0)),
    "WINDOW_UPDATE over the top": frame(FrameType.WINDOW_UPDATE, struct.pack(">I", 2**31 - 1)),
    "empty DATA": frame(FrameType.DATA, stream=1),
    "DATA of a stream that is not there": frame(FrameType.DATA, b"x", stream=77),
    "DATA with more padding than content": frame(FrameType.DATA, b"\xffab", flags=PADDED, stream=1),
    "RST_STREAM of streams that are not there": frame(FrameType.RST_STREAM, struct.pack(">I", 8), stream=999),
    "frames of an unknown type": frame(0xFA, b"x" * 100),
    "frames that are too long": frame(FrameType.DATA, b"x" * 100, stream=1, length=0xFFFFFF),
    "SETTINGS of five bytes": frame(FrameType.SETTINGS, b"12345"),
    "bytes that are no frames": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("flood", G08_FLOODS.values(), ids=G08_FLOODS)
def test_g08_floods_of_frames(broker, flood):
    """10,000 of them around an open call: ended, or taken at little cost; others do not notice."""
    with others_go_on(broker, growth=30 << 20), connected(broker, OUTSIDER) as connection:
        before = processor_time(broker)
        with contextlib.suppress(ConnectionEndedError):
            stream = connection.next_stream()
            connection.send(frame(FrameType.HEADERS, request_headers(ISSUE_TOKEN), flags=END_HEADERS, stream=stream))
            for _ in range(100):
                connection.send(flood * 100)
            connection.take_in(0.1)
        assert processor_time(broker) - before < 5


def test_g08_a_client_that_pings_without_end_is_told_to_go_away(broker):
    """ENHANCE_YOUR_CALM (RFC 9113 section 7), as gRPC says it; the twin is one that pings twice."""
    for count, expected in ((2, None), (200, (11, b"too_many_pings"))):
        with connected(broker, OUTSIDER) as connection:
            with contextlib.suppress(ConnectionEndedError):
                connection.send(frame(FrameType.PING, b"12345678") * count)
                connection.take_in(0.3)
            assert expected == connection.goaway


def test_g08_data_that_is_never_read_does_not_pile_up(broker):
    """Callers who take no answer and go on sending are held back by a window of one message, not of megabytes."""
    part = frame(FrameType.DATA, b"z" * 16_384, stream=1)
    no_window = settings({INITIAL_WINDOW_SIZE: 0})
    with others_go_on(broker, growth=30 << 20), ExitStack() as stack:
        for _ in range(10):
            connection = stack.enter_context(connected(broker, own_settings=no_window))
            stream = connection.next_stream()
            with contextlib.suppress(ConnectionEndedError, TimeoutError):
                connection.send(
                    frame(FrameType.HEADERS, request_headers(ISSUE_TOKEN), flags=END_HEADERS, stream=stream),
                    frame(FrameType.DATA, grpc_message(REQUEST), stream=stream),
                )
                connection.send(*[part] * 1000, timeout=0.3)
