"""How much of the log libraries may fill (B10, B11)."""

from __future__ import annotations

import logging

import pytest

from carnet.log_lines import LineLimit
from carnet_broker.log_lines import LibraryLines


@pytest.fixture(name="limit")
def _limit() -> LineLimit:
    return LineLimit(2, mono=lambda: 100.0)


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
