"""Readiness: what stops a broker from issuing, and what is only amiss."""

from __future__ import annotations

import itertools

import pytest

from carnet_broker.core.readiness import Readiness, judge_readiness


@pytest.mark.parametrize("holds", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("draining", [True, False])
def test_ready_is_everything_that_is_needed_and_not_draining(holds, wanted, draining):
    """Each fact that does not hold is named, in its order; what is wanted alone never makes it unready."""
    needed = list(zip(holds, ("key", "audit"), strict=True))
    answer = judge_readiness(needed=needed, wanted=[(wanted, "vault")], draining=draining)
    problems = [text for fact, text in needed if not fact]
    expected = (
        ("the broker is shutting down", *problems) if draining else tuple(problems),
        () if wanted else ("vault",),
    )
    assert expected == (answer.problems, answer.degraded)
    assert (all(holds) and not draining) is answer.ready


def test_no_facts_are_no_problems():
    """Whoever asks about nothing is told of nothing."""
    assert Readiness((), ()) == judge_readiness(needed=(), wanted=(), draining=False)
