"""Durations, for all values rather than for some."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from carnet.durations import MAX_DURATION, format_duration, parse_duration

unhurried = settings(deadline=None)  # A busy machine is slow, and that is not what is tested here.
MILLISECOND = timedelta(milliseconds=1)


@unhurried
@given(st.integers(min_value=1, max_value=MAX_DURATION // MILLISECOND))
def test_what_is_written_reads_the_same_again(milliseconds: int) -> None:
    """Writing loses nothing of a whole number of milliseconds."""
    duration = timedelta(milliseconds=milliseconds)
    assert duration == parse_duration(format_duration(duration))


@unhurried
@given(st.text(max_size=20) | st.from_regex(r"[0-9]{0,15}(ms|s|m|h|d|w)?", fullmatch=True))
def test_a_text_is_a_duration_in_bounds_or_a_value_error(text: str) -> None:
    """No other error leaves the parser, and nothing outside the bounds."""
    try:
        duration = parse_duration(text)
    except ValueError:
        return
    assert timedelta(0) < duration <= MAX_DURATION
