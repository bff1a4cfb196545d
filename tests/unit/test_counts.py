from __future__ import annotations

import pytest

from support import counts


def test_quick_counts_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CARNET_COUNTS a proof repeats itself as often as `make test` can bear."""
    monkeypatch.delenv("CARNET_COUNTS", raising=False)
    assert 3 == counts.count("quick-is-the-default", quick=3, full=7)


def test_full_counts_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """CARNET_COUNTS=full is what `make prove` sets."""
    monkeypatch.setenv("CARNET_COUNTS", "full")
    assert 7 == counts.count("full-is-asked-for", quick=3, full=7)


def test_a_misspelt_form_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error must not turn a proof into a quick look."""
    monkeypatch.setenv("CARNET_COUNTS", "Full")
    with pytest.raises(ValueError, match="set it to 'quick' or 'full'"):
        counts.count("misspelt", quick=1, full=2)


@pytest.mark.parametrize(("quick", "full"), [(0, 1), (-1, 1), (2, 1)])
def test_counts_that_prove_nothing_are_an_error(quick: int, full: int) -> None:
    """No proof runs zero times, and the full one is not the smaller one."""
    with pytest.raises(ValueError, match="must be positive"):
        counts.count("nothing", quick=quick, full=full)


def test_one_name_has_one_pair_of_counts() -> None:
    """The table cannot say two things about one proof."""
    counts.count("one-name", quick=1, full=2)
    counts.count("one-name", quick=1, full=2)
    with pytest.raises(ValueError, match="were entered before"):
        counts.count("one-name", quick=1, full=3)
    assert {"quick": 1, "full": 2} == counts.table()["one-name"]
