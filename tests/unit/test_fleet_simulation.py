"""The simulation of a fleet: nothing is lost or told twice, and the page says what came out."""

from __future__ import annotations

import json

import pytest

from bench.fleet_model import Costs, Fleet, Run
from bench.fleet_page import page_with_tables, tables
from bench.fleet_simulation import MEASURED, PAGE, WRITTEN, bend, costs_of, death, fleet_figures, measured, wire
from bench.fleet_sizes import message_sizes

COSTS = Costs(heartbeat=0.0008, push=0.0012, opening=0.007, send_share=0.4)
CALM = {"heartbeat": 1e7, "connection_age": 1e9}


def run_of(verifiers: int, processes: int, **more: float) -> Run:
    """Return a run that has not begun."""
    return Run(Fleet(verifiers, processes, **more), COSTS)


def test_one_change_is_one_push_and_one_answer_for_each_verifier():
    """With nothing else going on the messages add up to the number of verifiers, and so do the rows in the store."""
    run = run_of(500, 5, **CALM)
    run.change_at(1.0)
    run.until(20.0)
    assert {"push": 500, "answer": 500} == dict(run.messages)
    assert (500, 500, 500) == (len(run.told_at[1]), len(run.answered_at), run.rows)


def test_a_change_takes_as_long_as_a_process_needs_for_all_of_its_streams():
    """The last of 100 streams is told after 100 turns, and the time that a process worked is what all of them cost."""
    run = run_of(500, 5, **CALM)
    run.change_at(1.0)
    run.until(20.0)
    assert pytest.approx(0.01 + 100 * COSTS.push * COSTS.send_share) == max(run.told_at[1])
    assert pytest.approx([100 * COSTS.push] * 5) == run.share(1.0)


def test_each_verifier_is_told_each_change_once_whatever_happens():
    """A burst, heartbeats, a process that dies in the middle, and connections that reach their age."""
    run = run_of(300, 4, heartbeat=2.0, connection_age=6.0)
    run.until(1.0)
    for number in range(200):
        run.change_at(1.0 + number / 100)
    run.death_at(1.7)
    run.until(15.0)
    assert [] == list(run.outstanding())
    assert {300} == {len(told) for told in run.told_at.values()}
    assert 300 * 200 == sum(changes * often for changes, often in run.deltas.items())


def test_what_comes_while_a_stream_waits_joins_its_delta():
    """Ten changes at one moment are told of in one or two pushes to each."""
    run = run_of(200, 2, **CALM)
    for _ in range(10):
        run.change_at(1.0)
    run.until(10.0)
    assert {1, 9, 10} >= set(run.deltas) >= {10}
    assert run.messages["push"] <= 400


def test_heartbeats_come_as_often_as_their_period_says_and_each_is_answered():
    """A period is 0.8 to 1 of what is set: 1.11 heartbeats on average in one that is set."""
    run = run_of(2_000, 20, connection_age=1e9)
    run.until(60.0)
    assert pytest.approx(2_000 * 60 / 15 / 0.9, rel=0.05) == run.messages["heartbeat"]
    assert 0 <= run.messages["heartbeat"] - run.messages["answer"] <= 5
    assert 0 == run.rows


def test_all_streams_of_a_process_that_dies_are_back_at_the_others():
    """Each of them once, after up to half a second of waiting and its turn."""
    figures = death(Fleet(1_000, 10), COSTS, wire(measured(MEASURED)))
    assert 100 == figures["streams"]
    assert figures["back_p50_ms"] <= figures["back_p99_ms"] <= figures["back_last_ms"] < 700


def test_dearer_streams_bend_a_process_sooner():
    """Twice the cost is about half the streams, for each limit that is one of time."""
    once = measured(MEASURED)
    twice = once | {name: 2 * once[name] for name in ("heartbeat_cpu_us", "push_cpu_us", "open_cpu_us")}
    for name in ("heartbeats", "push"):
        assert pytest.approx(bend(once)["streams"][name] / 2, rel=0.05) == bend(twice)["streams"][name]


def test_the_kept_figures_are_those_of_the_real_messages_and_the_measured_costs():
    """Sizes and bends are made again here; the fleets, which take long, as one small fleet that must run."""
    kept = json.loads(WRITTEN.read_text())
    costs = measured(MEASURED)
    assert costs == kept["costs"]
    assert message_sizes() == kept["message_bytes"]
    assert wire(costs) == kept["wire_bytes"]
    assert bend(costs) == kept["bend"]["measured"]
    small = fleet_figures(Fleet(400, 4), costs_of(costs), wire(costs))
    for figures in kept["fleets"].values():
        assert {part: list(figures[part]) for part in small if part != "streams_of_a_process"} == {
            part: list(small[part]) for part in small if part != "streams_of_a_process"
        }


def test_the_page_has_the_kept_figures():
    """The tables of docs/scale.md are those that the kept figures give."""
    kept = json.loads(WRITTEN.read_text())
    page = PAGE.read_text()
    assert page_with_tables(page, kept) == page
    assert all(table in page for table in tables(kept).values())


def test_a_page_without_a_place_for_a_table_is_refused():
    """Nothing is written where it would be lost."""
    with pytest.raises(ValueError, match="0 places"):
        page_with_tables("no tables", json.loads(WRITTEN.read_text()))
