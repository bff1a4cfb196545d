"""How much of the log one source may fill (B10)."""

from __future__ import annotations

import logging

import pytest

from carnet.grpc.refusal_log import RefusalLog
from carnet.grpc.refusals import Refusal, RefusedError
from carnet.log_lines import LineLimit

REFUSED = RefusedError(Refusal.NO_TOKEN, "no token")


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


def lines_of(caplog: pytest.LogCaptureFixture, start: str) -> list[str]:
    """Return the lines that begin so, and forget all."""
    lines = [line for line in caplog.messages if line.startswith(start)]
    caplog.clear()
    return lines


def test_b10_a_caller_that_is_refused_again_and_again_fills_its_part_of_a_servers_log(clock, caplog):
    """Forty lines at once, then ten a second; how many were left out is told with the next line, once a second."""
    log = RefusalLog(mono=clock)
    with caplog.at_level(logging.WARNING, "carnet.grpc"):
        for _ in range(1000):
            log.refused("/shop.Payments/Charge", "orders", REFUSED)
        assert ["refused '/shop.Payments/Charge' to orders: no token"] * 40 == lines_of(caplog, "")
        clock.seconds += 1
        for _ in range(1000):
            log.refused("/shop.Payments/Charge", "orders", REFUSED)
        told = [line for line in caplog.messages if line.startswith("left out")]
        assert ["left out 960 lines about refused calls: too many of one caller"] == told
        assert 10 == len(lines_of(caplog, "refused"))


def test_b10_a_noisy_caller_hides_no_other_from_a_servers_log(clock, caplog):
    """The twin: what one uses up, another still has."""
    log = RefusalLog(mono=clock)
    with caplog.at_level(logging.WARNING, "carnet.grpc"):
        for _ in range(1000):
            log.refused("/shop.Payments/Charge", "orders", REFUSED)
        caplog.clear()
        log.refused("/shop.Payments/Refund", "cron", REFUSED)
        assert ["refused '/shop.Payments/Refund' to cron: no token"] == lines_of(caplog, "refused")
