"""The table of counts, which decides how much a proof proves."""

from __future__ import annotations

import pytest

from support.counts import ALL, TABLE, count


def test_quick_counts_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CARNET_COUNTS a proof repeats itself as often as `make test` can bear."""
    monkeypatch.delenv("CARNET_COUNTS", raising=False)
    assert TABLE["rotations_under_load"][0] == count("rotations_under_load")


def test_full_counts_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """CARNET_COUNTS=full is what `make prove` sets."""
    monkeypatch.setenv("CARNET_COUNTS", "full")
    assert TABLE["rotations_under_load"][1] == count("rotations_under_load")


def test_a_misspelt_form_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error must not turn a proof into a quick look."""
    monkeypatch.setenv("CARNET_COUNTS", "Full")
    with pytest.raises(ValueError, match="set it to 'quick' or 'full'"):
        count("rotations_under_load")


def test_a_proof_that_is_not_in_the_table_has_no_count() -> None:
    """A count cannot be made up where it is used."""
    with pytest.raises(KeyError):
        count("made-up")


def test_all_takes_as_many_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """And has to be told how many that is."""
    name = next(name for name, (_, full) in TABLE.items() if full == ALL)
    monkeypatch.setenv("CARNET_COUNTS", "full")
    assert 17 == count(name, of=17)
    with pytest.raises(ValueError, match="say how many"):
        count(name)


def test_no_count_proves_nothing() -> None:
    """No proof runs zero times, and the full one is not the smaller one."""
    assert [] == [name for name, (quick, full) in TABLE.items() if not (0 < quick and (full == ALL or quick <= full))]
