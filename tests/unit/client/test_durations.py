"""Durations: what is read, what is refused, and that writing is the reverse of reading."""

from __future__ import annotations

from datetime import timedelta

import pytest

from carnet.durations import MAX_DURATION, format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500ms", timedelta(milliseconds=500)),
        ("90s", timedelta(seconds=90)),
        ("10m", timedelta(minutes=10)),
        ("24h", timedelta(hours=24)),
        ("7d", timedelta(days=7)),
        ("1ms", timedelta(milliseconds=1)),
        ("007s", timedelta(seconds=7)),
        ("3660d", timedelta(days=3660)),
        ("316224000000ms", timedelta(days=3660)),
    ],
)
def test_one_number_and_one_unit_is_a_duration(text: str, expected: timedelta) -> None:
    """Milliseconds, seconds, minutes, hours and days, up to ten years."""
    assert expected == parse_duration(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "s", "10", "10 s", " 10s", "10s ", "10s\n", "-1s", "+1s", "1.5h", "1h30m", "1e3s", "10S", "10us"),
        *("10w", "10y", "0x10s", "1_000s", "٣s", "³s", "1s\x00", "NaN", "infs", "9999999999999s"),
    ],
)
def test_anything_else_is_refused_with_the_form_to_write(text: str) -> None:
    """No sums, fractions, signs, spaces, other units, other digits, or numbers without a unit."""
    with pytest.raises(ValueError, match="is not a duration; write a whole number and one unit"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["0ms", "0s", "000d"])
def test_zero_is_refused(text: str) -> None:
    """A limit of nothing is a mistake, and never means "no limit"."""
    with pytest.raises(ValueError, match="give a duration longer than zero"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["3661d", "316224000001ms", "999999999999d"])
def test_longer_than_ten_years_is_refused(text: str) -> None:
    """Also where the number is beyond what a timedelta can hold."""
    with pytest.raises(ValueError, match="is too long; give at most 3660d"):
        parse_duration(text)


def test_a_message_repeats_only_the_beginning_of_a_long_text() -> None:
    """A megabyte of rubbish does not become a megabyte of message."""
    with pytest.raises(ValueError, match="is not a duration") as refused:
        parse_duration("x" * 1_000_000)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (timedelta(0), "0s"),
        (timedelta(microseconds=999), "0s"),
        (timedelta(milliseconds=1), "1ms"),
        (timedelta(milliseconds=1500, microseconds=7), "1500ms"),
        (timedelta(seconds=90), "90s"),
        (timedelta(seconds=120), "2m"),
        (timedelta(minutes=90), "90m"),
        (timedelta(hours=24), "1d"),
        (timedelta(hours=36), "36h"),
        (MAX_DURATION, "3660d"),
    ],
)
def test_a_duration_is_written_in_its_largest_whole_unit(duration: timedelta, expected: str) -> None:
    """Parts of a millisecond are cut off."""
    assert expected == format_duration(duration)


def test_a_negative_duration_cannot_be_written() -> None:
    """There is no sign in the form, so dropping it would be a lie."""
    with pytest.raises(ValueError, match="is negative"):
        format_duration(timedelta(microseconds=-1))
