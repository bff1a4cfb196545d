"""How much of the log one source may fill (B10, B11)."""

from __future__ import annotations

import logging

import pytest

from carnet_broker.log_lines import LibraryLines, LineLimit


class Clock:
    """Monotonic seconds that stand still until they are moved."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        """Return them."""
        return self.seconds


@pytest.fixture(name="clock")
def _clock() -> Clock:
    return Clock()


@pytest.fixture(name="limit")
def _limit(clock: Clock) -> LineLimit:
    return LineLimit(2, mono=clock)


def admitted(limit: LineLimit, source: str, count: int) -> int:
    """Return how many of `count` lines of a source were let in."""
    return sum(limit.admits(source) for _ in range(count))


def test_a_source_writes_a_burst_and_then_its_rate(limit, clock):
    """Four seconds' worth at once, then so many each second; what is over that is left out."""
    assert 8 == admitted(limit, "orders", 100)
    clock.seconds += 1
    assert 2 == admitted(limit, "orders", 100)
    clock.seconds += 100
    assert 8 == admitted(limit, "orders", 100)


def test_a_noisy_source_does_not_silence_another(limit):
    """Each has its own part: those that are not authenticated cannot hide what a workload does, nor the reverse."""
    assert 8 == admitted(limit, "", 1000)
    assert 8 == admitted(limit, "orders", 8)


def test_what_is_left_out_is_counted_once(limit):
    """The count is of all sources, and starts again when it was taken."""
    admitted(limit, "", 10)
    admitted(limit, "orders", 11)
    assert [5, 0] == [limit.take_left_out(), limit.take_left_out()]
    admitted(limit, "", 1)
    assert 1 == limit.take_left_out()


def record(name: str, message: str, *arguments: object) -> logging.LogRecord:
    """Return what a library's logger makes of its arguments."""
    return logging.LogRecord(name, logging.ERROR, __file__, 1, message, arguments, None)


def test_each_library_is_a_source(limit):
    """One that repeats itself is cut off, the next one is heard."""
    lines = LibraryLines(limit)
    assert 8 == sum(lines.filter(record("asyncio", "again")) for _ in range(20))
    assert lines.filter(record("uvicorn.error", "once"))


def test_b11_metadata_that_grpc_quotes_stays_out_of_the_log(limit):
    """Its line about metadata that is not UTF-8 holds all of it, also a token; the twin is any other line of gRPC."""
    lines = LibraryLines(limit)
    assert not lines.filter(record("grpc._cython.cygrpc", "Invalid encoding on %s", b"Bearer eyJ\xff"))
    assert lines.filter(record("grpc._cython.cygrpc", "Unexpected [%s] raised", "ValueError"))
