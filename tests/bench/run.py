"""``make bench``: what a token costs the server, as CPU of the server's process.

Absolute figures are from one machine; the ratios of one run are what counts. Variants take turns, round by round, so
that a drifting machine touches all of them alike; the median is quoted. Nothing here fails: it measures.

The audit record is written with ``durability: write``, so that the stacks are compared and not the disk; the variant
``fsync`` has the broker's default.

``run.py [--rounds N] [--seconds S] [--write FILE]``
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Variant:
    """One server and one way to ask it."""

    name: str
    stack: str
    threads: int
    in_flight: int = 32
    batch: int = 1
    durability: str = "write"


VARIANTS = (
    Variant("aio, 1 token a call", "aio", 0),
    Variant("sync 4 threads, 1 token a call", "sync", 4),
    Variant("sync 32 threads, 1 token a call", "sync", 32),
    Variant("aio, 16 tokens a call", "aio", 0, batch=16),
    Variant("sync 4 threads, 16 tokens a call", "sync", 4, batch=16),
    Variant("aio, 1 in flight", "aio", 0, in_flight=1),
    Variant("sync 4 threads, 1 in flight", "sync", 4, in_flight=1),
    Variant("aio, 1 token a call, fsync", "aio", 0, durability="fsync"),
)


def _environment() -> dict[str, str]:
    paths = [ROOT / "client", ROOT / "broker", ROOT / "certs" / "scripts", ROOT / "tests"]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def _server(variant: Variant, directory: Path) -> Iterator[tuple[int, str]]:
    process = subprocess.Popen(
        [
            sys.executable,
            str(HERE / "stack_server.py"),
            variant.stack,
            str(variant.threads),
            variant.durability,
            str(directory),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_environment(),
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.pid, f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.communicate()


def _tokens(address: str, directory: Path, seconds: float, variant: Variant) -> int:
    done = subprocess.run(
        [
            sys.executable,
            str(HERE / "token_client.py"),
            address,
            str(directory),
            str(seconds),
            str(variant.in_flight),
            str(variant.batch),
        ],
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def _measure(variant: Variant, seconds: float) -> tuple[float, float]:
    """Return CPU microseconds per token of the server, and tokens a second."""
    with tempfile.TemporaryDirectory() as place, _server(variant, Path(place)) as (pid, address):
        _tokens(address, Path(place), 0.5, variant)
        before = _cpu_seconds(pid)
        count = _tokens(address, Path(place), seconds, variant)
        return (_cpu_seconds(pid) - before) / count * 1e6, count / seconds


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Rounds over all variants.")
@click.option("--seconds", default=3.0, show_default=True, help="Length of one measurement.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the figures as JSON.")
def main(rounds: int, seconds: float, write: Path | None) -> None:
    """Measure what a token costs the server."""
    figures: dict[str, list[tuple[float, float]]] = {variant.name: [] for variant in VARIANTS}
    for number in range(rounds):
        for variant in VARIANTS:
            click.echo(f"round {number + 1} of {rounds}: {variant.name}", err=True)
            figures[variant.name].append(_measure(variant, seconds))
    base = statistics.median(cpu for cpu, _ in figures[VARIANTS[0].name])
    click.echo(f"{'variant':<36}{'CPU us/token':>14}{'ratio':>8}{'tokens/s':>10}")
    summary = {}
    for name, measured in figures.items():
        cpu, rate = (statistics.median(column) for column in zip(*measured, strict=True))
        click.echo(f"{name:<36}{cpu:>14.0f}{cpu / base:>8.2f}{rate:>10.0f}")
        summary[name] = {"cpu_us_per_token": round(cpu), "ratio": round(cpu / base, 3), "tokens_per_s": round(rate)}
    if write is not None:
        write.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
