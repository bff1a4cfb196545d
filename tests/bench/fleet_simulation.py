"""100,000 verifiers on paper: what a fleet sends, what it costs, and where one trust process bends.

Run in ``tests/``: ``python -m bench.fleet_simulation [--costs FILE] [--write]``. The sizes are those of the real
messages (`fleet_sizes`), the costs are those that ``trust_stream_cost`` measured, the rest is `fleet_model`. With
``--write`` the figures go to ``docs/measurements/fleet_simulation.json``, and the tables of ``docs/scale.md`` are made
anew of them (`fleet_page`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import click

from bench.fleet_model import Costs, Fleet, Run, percentile
from bench.fleet_page import page_with_tables, tables
from bench.fleet_sizes import changes, message_sizes, on_the_wire

__all__ = ["bend", "costs_of", "death", "fleet_figures", "measured", "wire"]

ROOT: Final = Path(__file__).parents[2]
MEASURED: Final = ROOT / "docs" / "measurements" / "trust_stream_cost.json"
WRITTEN: Final = ROOT / "docs" / "measurements" / "fleet_simulation.json"
PAGE: Final = ROOT / "docs" / "scale.md"

VERIFIERS: Final = 100_000
PROCESSES: Final = (50, 250)
QUIET: Final = 27.0
"""Seconds: two heartbeats of each stream, about."""
AFTER_A_DEATH: Final = 5.0
ALIKE: Final = 4
"""Processes that are simulated where all are alike and none has to do with another; the others are as these."""
BURST_RATE: Final = 100
BURST: Final = 3.0
MOST_CPU: Final = 0.7
MOST_PUSH: Final = 0.25
MEMORY: Final = 1024**3
MEMORY_OF_ONE_PROCESS: Final = 150 * 1024**2
CONNECTIONS: Final = 10_000
"""`limits.connections`, as it is set when nobody sets it."""

BARE: Final = {
    "heartbeat_cpu_us": 88,
    "push_cpu_us": 88,
    "open_cpu_us": 2_400,
    "memory_bytes": 110_000,
    "send_share": 0.5,
}
"""gRPC for Python alone: the same stream without identity, policy, answers, store and record, 1,000 of them."""


def costs_of(figures: dict[str, Any]) -> Costs:
    """Return the costs in seconds."""
    return Costs(
        heartbeat=figures["heartbeat_cpu_us"] / 1e6,
        push=figures["push_cpu_us"] / 1e6,
        opening=figures["open_cpu_us"] / 1e6,
        send_share=figures["send_share"],
    )


def measured(file: Path) -> dict[str, Any]:
    """Return the costs that were measured."""
    figures: dict[str, Any] = json.loads(file.read_text())["figures"]
    # While a push goes to all, the processor time up to the last one out is that part of what all of them cost.
    whole = figures["streams"] * figures["push_cpu_us"] / 1e3
    return figures | {"send_share": round(min(figures["push_to_all_ms_median"] / whole, 1.0), 3)}


# -- bytes -------------------------------------------------------------------------------------------------------------


def wire(figures: dict[str, Any]) -> dict[str, float]:
    """Return the bytes on the network of each message: framing, TLS, TCP and IP included."""
    sizes = message_sizes()
    down = figures["heartbeat_bytes_down"] - sizes["heartbeat"]
    up = figures["heartbeat_bytes_up"] - sizes["answer"]
    told = ("heartbeat", "key_set_of_3", "delta_of_1", "delta_of_100")
    sent = {name: on_the_wire(sizes[name], down) for name in told}
    sent["answer"] = on_the_wire(sizes["answer"], up)
    sent["snapshot_of_10000"] = sum(on_the_wire(size, down) for size in changes(10_000, snapshot=True))
    sent["opening_up"] = on_the_wire(figures["opening_bytes_up"], 0)
    sent["opening_down"] = on_the_wire(figures["opening_bytes_down"], 0)
    return {name: round(size) for name, size in sent.items()}


def passed(run: Run, sent: dict[str, float], push: str) -> tuple[float, float]:
    """Return the bytes that passed up and down in a run whose changes are each a `push`."""
    entry = (sent["delta_of_100"] - sent["delta_of_1"]) / 99
    more = sum((told - 1) * entry * often for told, often in run.deltas.items()) if push == "delta_of_1" else 0.0
    opened = run.messages["hello"]
    up = (run.messages["answer"] - 2 * opened) * sent["answer"] + opened * sent["opening_up"]
    down = run.messages["heartbeat"] * sent["heartbeat"] + run.messages["push"] * sent[push] + more
    return up, down + opened * sent["opening_down"]


# -- scenarios ---------------------------------------------------------------------------------------------------------


def quiet(fleet: Fleet, costs: Costs, sent: dict[str, float]) -> dict[str, Any]:
    """Nothing happens: heartbeats, their answers, and connections that reach their age."""
    some, times = _some_of(fleet)
    run = Run(some, costs)
    run.until(QUIET)
    up, down = passed(run, sent, "delta_of_1")
    shares = run.share(QUIET)
    times /= QUIET
    return {
        "messages_per_s": _rounded(run.messages.total() * times),
        "messages_up_per_s": _rounded((run.messages["answer"] + run.messages["hello"]) * times),
        "connections_per_s": _rounded(run.messages["hello"] * times),
        "bytes_up_per_s": _rounded(up * times),
        "bytes_down_per_s": _rounded(down * times),
        "cpu_share_mean": round(sum(shares) / len(shares), 3),
        "cpu_share_most": round(max(shares), 3),
    }


def one_change(fleet: Fleet, costs: Costs, sent: dict[str, float], push: str) -> dict[str, Any]:
    """One revocation, or one generation of keys: told to all, and answered by all."""
    some, times = _some_of(fleet)
    run = _calm(some, costs)
    run.change_at(0.0)
    end = 5 + 2 * fleet.verifiers / fleet.processes * costs.push
    run.until(end)
    up, down = passed(run, sent, push)
    return _spread(run.told_at[1]) | {
        "last_answer_ms": _ms(max(run.answered_at)),
        "pushes": round(run.messages["push"] * times),
        "bytes_up": _rounded(up * times),
        "bytes_down": _rounded(down * times),
        "rows_in_the_store": round(run.rows * times),
        "cpu_seconds_of_one_process": round(max(run.share(1.0)), 2),
    }


def burst(fleet: Fleet, costs: Costs, sent: dict[str, float]) -> dict[str, Any]:
    """100 revocations a second."""
    some, times = _some_of(fleet)
    run = _calm(some, costs)
    count = round(BURST_RATE * BURST)
    for number in range(count):
        run.change_at(number / BURST_RATE)
    run.until(BURST)
    share = max(run.share(BURST))
    run.until(BURST + 10 + 3 * fleet.verifiers / fleet.processes * costs.push)
    up, down = passed(run, sent, "delta_of_1")
    all_told = [told for version in run.told_at.values() for told in version]
    return _spread(all_told) | {
        "revocations": count,
        "pushes": round(run.messages["push"] * times),
        "revocations_in_a_push": round(len(all_told) / run.deltas.total(), 1),
        "bytes_up_per_s": _rounded(up * times / BURST),
        "bytes_down_per_s": _rounded(down * times / BURST),
        "cpu_share_most": round(min(share, 1.0), 3),
        "rows_in_the_store": round(run.rows * times),
    }


def death(fleet: Fleet, costs: Costs, sent: dict[str, float]) -> dict[str, Any]:
    """One process dies, and its streams go to the others."""
    run = Run(fleet, costs)
    run.until(1.0)
    before = run.messages.copy()
    run.death_at(1.0)
    run.until(1.0 + AFTER_A_DEATH)
    back = run.back_after
    return {
        "streams": len(back),
        "back_p50_ms": _ms(percentile(back, 50)),
        "back_p99_ms": _ms(percentile(back, 99)),
        "back_last_ms": _ms(max(back)),
        "longest_queue_ms": _ms(run.longest_queue),
        "connections": run.messages["hello"] - before["hello"],
        "bytes_down": _rounded(len(back) * sent["opening_down"]),
    }


def bend(figures: dict[str, Any], heartbeat: float = 15.0) -> dict[str, Any]:
    """Return how many streams one process can have, by each of its limits."""
    costs = costs_of(figures)
    each = costs.heartbeat / (heartbeat * 0.9) + costs.opening / Fleet(1, 1).connection_age
    bounds = {
        "heartbeats": math.floor(MOST_CPU / each),
        "push": _most_streams(costs, heartbeat),
        "memory": math.floor((MEMORY - MEMORY_OF_ONE_PROCESS) / figures["memory_bytes"]),
        "connections": CONNECTIONS,
    }
    at = min(bounds, key=lambda name: bounds[name])
    return {
        "streams": bounds,
        "bends_at": bounds[at],
        "because_of": at,
        "processes_for_100000": math.ceil(VERIFIERS / bounds[at]),
    }


def _most_streams(costs: Costs, heartbeat: float) -> int:
    """Return up to how many streams 99 % of them are told of a change in time."""
    guess = MOST_PUSH / (costs.push * costs.send_share)
    low, high = max(round(guess / 2), 1), round(guess * 1.5)
    while high - low > max(low // 100, 1):
        middle = (low + high) // 2
        run = Run(Fleet(middle, 1, heartbeat), costs)
        run.until(0.5)
        run.change_at(0.5)
        run.until(0.5 + 2 * MOST_PUSH)
        told = run.told_at[1]
        in_time = sum(after <= MOST_PUSH for after in told) >= 0.99 * middle
        low, high = (middle, high) if in_time else (low, middle)
    return low


def _some_of(fleet: Fleet) -> tuple[Fleet, float]:
    """Return a part of the fleet that is like the whole, and how often the whole has it."""
    some = min(ALIKE, fleet.processes)
    each = fleet.verifiers // fleet.processes
    return Fleet(each * some, some, fleet.heartbeat, fleet.connection_age), fleet.verifiers / (each * some)


def _calm(fleet: Fleet, costs: Costs) -> Run:
    """Return a run from which what a change causes can be read: heartbeats and reconnections are far away."""
    return Run(Fleet(fleet.verifiers, fleet.processes, 1e7, 1e9), costs)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "p50_ms": _ms(percentile(values, 50)),
        "p99_ms": _ms(percentile(values, 99)),
        "last_ms": _ms(max(values)),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1) if seconds < 1 else round(seconds * 1e3)


def _rounded(value: float) -> int:
    """Return the value to three digits."""
    return int(round(value, 2 - math.floor(math.log10(value)))) if value >= 1000 else round(value)


def fleet_figures(fleet: Fleet, costs: Costs, sent: dict[str, float]) -> dict[str, Any]:
    """Return what becomes of one fleet in each scenario."""
    return {
        "streams_of_a_process": fleet.verifiers // fleet.processes,
        "quiet": quiet(fleet, costs, sent),
        "generation": one_change(fleet, costs, sent, "key_set_of_3"),
        "revocation": one_change(fleet, costs, sent, "delta_of_1"),
        "burst": burst(fleet, costs, sent),
        "death": death(fleet, costs, sent),
    }


def simulate(figures: dict[str, Any], *, verifiers: int = VERIFIERS, processes: Iterable[int] = PROCESSES) -> Any:  # noqa: ANN401 - JSON
    """Return all figures. `figures` are the costs."""
    sent = wire(figures)
    costs = costs_of(figures)
    fleets = {str(count): fleet_figures(Fleet(verifiers, count), costs, sent) for count in processes}
    return {
        "costs": figures,
        "bare_costs": BARE,
        "message_bytes": message_sizes(),
        "wire_bytes": sent,
        "verifiers": verifiers,
        "fleets": fleets,
        "bend": {"measured": bend(figures), "bare": bend(BARE)},
    }


@click.command()
@click.option("--costs", type=click.Path(path_type=Path, exists=True), default=MEASURED, help="Of trust_stream_cost.")
@click.option("--write", is_flag=True, help="Write the figures and the tables of docs/scale.md.")
def main(costs: Path, *, write: bool) -> None:
    """Simulate 100,000 verifiers."""
    result = simulate(measured(costs))
    for name, table in tables(result).items():
        click.echo(f"{name}\n{table}\n")
    if write:
        WRITTEN.write_text(json.dumps(result, indent=2) + "\n")
        PAGE.write_text(page_with_tables(PAGE.read_text(), result))


if __name__ == "__main__":
    main()
