from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carnet.admission import Admission


def admitted(admission: Admission, identity: str, mono: float, *, tries: int = 100, cost: int = 1) -> int:
    """Count how many of `tries` calls are admitted at one moment."""
    return sum(admission.admit(identity, cost, mono) is None for _ in range(tries))


def test_a_quiet_identity_may_send_a_burst_and_then_goes_at_the_rate():
    """Ten at once; after that ten a second."""
    admission = Admission(rate=10, burst=10)

    assert 10 == admitted(admission, "a", 0.0)
    assert 0 == admitted(admission, "a", 0.0999)
    assert 1 == admitted(admission, "a", 0.1001)
    assert 10 == admitted(admission, "a", 100.0)


def test_identities_do_not_share_an_allowance():
    """Limits are per SPIFFE ID (B09): what one uses up, another still has."""
    admission = Admission(rate=1, burst=3)

    assert 3 == admitted(admission, "a", 0.0)
    assert 3 == admitted(admission, "b", 0.0)


def test_who_waits_as_told_is_admitted_and_who_comes_earlier_is_not():
    """The wait is exact to the microsecond, and a refused call makes it no longer."""
    admission = Admission(rate=3, burst=2)
    admitted(admission, "a", 5.0)

    wait = admission.admit("a", 1, 5.0)

    assert timedelta(seconds=1 / 3) == wait
    assert wait is not None
    assert admission.admit("a", 1, 5.0 + wait.total_seconds() - 0.001) is not None
    assert admission.admit("a", 1, 5.0 + wait.total_seconds()) is None


def test_a_batch_costs_its_tokens():
    """Four and six use up ten; the next waits."""
    admission = Admission(rate=10, burst=10)

    assert admission.admit("a", 4, 0.0) is None
    assert admission.admit("a", 6, 0.0) is None
    assert timedelta(seconds=0.1) == admission.admit("a", 1, 0.0)
    assert timedelta(seconds=0.7) == admission.admit("a", 7, 0.0)


def test_a_batch_above_the_burst_needs_a_full_allowance_and_is_paid_off():
    """Otherwise a large batch would either never pass or be a way around the rate."""
    admission = Admission(rate=10, burst=10)

    assert admission.admit("a", 30, 0.0) is None
    assert timedelta(seconds=2.1) == admission.admit("a", 1, 0.0)
    assert timedelta(seconds=1.0) == admission.admit("a", 30, 2.0)
    assert admission.admit("a", 30, 3.0) is None


@pytest.mark.parametrize("cost", [0, -5])
def test_a_call_that_asks_for_nothing_costs_one(cost: int):
    """A cost below one may not pay anything back."""
    admission = Admission(rate=1, burst=2)

    assert 2 == admitted(admission, "a", 0.0, cost=cost)


@pytest.mark.parametrize(
    "figures",
    [
        {"rate": 0, "burst": 1},
        {"rate": -1, "burst": 1},
        {"rate": float("inf"), "burst": 1},
        {"rate": float("nan"), "burst": 1},
        {"rate": 1, "burst": 0},
        {"rate": 1, "burst": 1, "capacity": 7},
    ],
)
def test_figures_that_admit_nobody_or_everybody_are_refused(figures: dict[str, Any]):
    """Zero, negative, infinite, not a number."""
    with pytest.raises(ValueError, match="must be positive"):
        Admission(**figures)


def test_the_table_is_bounded():
    """A million names take the room of a few."""
    admission = Admission(rate=1, burst=1, capacity=64)

    for number in range(10_000):
        admission.admit(f"identity {number}", 1, number / 100)

    assert len(admission._paid_off_at) <= 64


def test_pushing_oneself_out_of_the_table_resets_nothing():
    """B09: many names cannot be used to have one's own debt forgotten."""
    admission = Admission(rate=1, burst=5, capacity=8)
    assert 5 == admitted(admission, "greedy", 0.0)
    for number in range(100):
        admission.admit(f"other {number}", 5, 0.0)

    assert "greedy" not in admission._paid_off_at
    assert 0 == admitted(admission, "greedy", 0.0)
    assert 1 == admitted(admission, "greedy", 1.0)


def test_those_that_have_paid_off_make_room_without_a_floor():
    """A full table of idle identities costs a newcomer nothing."""
    admission = Admission(rate=1, burst=2, capacity=8)
    for number in range(8):
        admission.admit(f"old {number}", 1, 0.0)

    assert 2 == admitted(admission, "new", 10.0)
    assert {"new"} == set(admission._paid_off_at)


def test_a_newcomer_to_a_full_table_owes_as_much_as_the_least_busy():
    """And not as much as the busiest."""
    admission = Admission(rate=1, burst=10, capacity=8)
    for number in range(8):
        admission.admit(f"busy {number}", number + 1, 0.0)
    admission.admit("pushes one out", 1, 0.0)

    assert 9 == admitted(admission, "new", 0.0)


@settings(deadline=None)  # A busy machine is slow, and that is not what is tested here.
@given(
    capacity=st.integers(8, 12),
    calls=st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 8), st.floats(0, 2, allow_nan=False)), min_size=1, max_size=200
    ),
)
def test_a_bounded_table_admits_nothing_that_an_unbounded_one_would_not(
    capacity: int, calls: list[tuple[int, int, float]]
):
    """Whatever the order of calls, forgetting never gives anybody an allowance."""
    bounded = Admission(rate=2, burst=4, capacity=capacity)
    exact = Admission(rate=2, burst=4, capacity=1000)
    mono = 0.0
    for number, cost, pause in calls:
        mono += pause
        if bounded.admit(str(number), cost, mono) is None:
            assert exact.admit(str(number), cost, mono) is None


@settings(deadline=None)  # A busy machine is slow, and that is not what is tested here.
@given(calls=st.lists(st.tuples(st.integers(1, 4), st.floats(0, 2, allow_nan=False)), min_size=1, max_size=200))
def test_in_no_window_is_more_admitted_than_burst_and_rate_allow(calls: list[tuple[int, float]]):
    """The promise itself: at most burst + rate x length in any window."""
    admission = Admission(rate=2, burst=4)
    mono, passed = 0.0, []
    for cost, pause in calls:
        mono += pause
        if admission.admit("a", cost, mono) is None:
            passed.append((mono, cost))
    for first, (start, _) in enumerate(passed):
        total = 0
        for at, cost in passed[first:]:
            total += cost
            assert total <= 4 + 2 * (at - start) + 1e-3
