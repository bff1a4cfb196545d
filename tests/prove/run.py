"""``make prove``: the long proofs with their full counts, one at a time, with the figures in ``docs/measurements``.

Each proof is a test of `make test` that takes its count from `support.counts`. ``run.py NAME...`` runs some of them.
A proof that fails leaves the last figures as they are; the exit code is 1.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import click

ROOT = Path(__file__).parents[2]
MEASUREMENTS = ROOT / "docs" / "measurements"


@dataclass(frozen=True, slots=True)
class Proof:
    """One proof: what it shows, the tests that show it, and the longest that it may take."""

    shows: str
    tests: tuple[str, ...]
    minutes: int = 25


_ROTATION = "tests/e2e/test_acknowledged_rotation.py"

PROOFS = {
    "rotations_under_load": Proof(
        "rotations by CI under load refuse no good token", ("tests/e2e/test_rotation_under_load.py",)
    ),
    "acknowledged_rotation": Proof(
        "while three replicas rotate under load, no live verifier misses a key",
        ("tests/e2e/test_acknowledged_rotation.py::test_no_live_verifier_misses_a_key_through_acknowledged_rotations",),
    ),
    "rotation_without_waiting": Proof(
        "verifiers with a timer refuse good tokens where brokers do not wait for them",
        (f"{_ROTATION}::test_a_verifier_with_a_timer_refuses_good_tokens_where_the_broker_does_not_wait",),
    ),
    "key_revoked": Proof(
        "a signing key is revoked: within a second all verifiers refuse it, and no token of the next key is refused",
        ("tests/e2e/test_key_revocation.py",),
    ),
    "simultaneous_rotations": Proof(
        "two requests at the same moment cause one rotation; brokers killed at any moment lose nothing",
        ("tests/integration/test_two_rotations.py",),
    ),
    "keyring_model": Proof(
        "the keyring and its driver against models of replicas, pollers, crashes and outages",
        ("tests/property/test_keyring_machine.py", "tests/property/test_rotation_machine.py"),
    ),
    "trust_model": Proof(
        "rotation, replicas, verifiers that watch or poll, revocation, a restored store and partitions at once: no live"
        " verifier refuses a good token, none accepts a revoked one for long",
        (
            "tests/property/test_trust_model.py",
            "tests/property/test_trust_traces.py",
            "tests/property/test_trust_guards.py",
        ),
    ),
    "verifier_properties": Proof(
        "what our verifier accepts, others accept too; no change of a token is accepted",
        ("tests/property/test_verify_properties.py", "tests/property/test_verify_differential.py"),
    ),
    "revocation_spread": Proof(
        "a revocation reaches every verifier within its bound, and one that cannot be reached accepts nothing for long",
        ("tests/e2e/test_revocation_spread.py",),
    ),
    "tls_storm": Proof(
        "many handshakes at the same time end no listener, and next to no session is resumed",
        ("tests/integration/test_tls_storm.py",),
    ),
    **{
        f"killed_while_revoking_{run + 1}": Proof(
            "kill -9 of brokers and of the database loses no acknowledged revocation, and no verifier skips a version",
            (f"tests/e2e/test_killed_while_revoking.py::test_no_acknowledged_revocation_is_lost_by_kill_9[{run}]",),
        )
        for run in range(5)
    },
    "token_cache_model": Proof("a valid token is always given out", ("tests/property/test_cache_model.py",)),
    "unknown_keys": Proof(
        "a flood of unknown keys causes one fetch and harms no good verification", ("tests/integration/test_trust.py",)
    ),
}


def _run(name: str, proof: Proof) -> bool:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        environment = os.environ | {"CARNET_COUNTS": "full", "CARNET_MEASUREMENTS": place}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-s",
            "--timeout=1500",
            f"--junitxml={report}",
            *proof.tests,
        ]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=proof.minutes * 60, check=False)
        except subprocess.TimeoutExpired:
            click.echo(f"{name}: not done within {proof.minutes} minutes", err=True)
            return False
        if done.returncode != 0:
            return False
        suite = ET.parse(report).getroot().find("testsuite")  # noqa: S314 - written by pytest, just now
        assert suite is not None
        figures = {file.stem: json.loads(file.read_text())["figures"] for file in sorted(Path(place).glob("*.json"))}
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],  # noqa: S607 - whichever git the developer has
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    content = {
        "shows": proof.shows,
        "command": f"make prove ({name})",
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "tests": int(suite.attrib["tests"]),
        "seconds": round(time.monotonic() - started),
        "figures": figures,
    }
    MEASUREMENTS.mkdir(parents=True, exist_ok=True)
    (MEASUREMENTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return True


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(PROOFS)))
def main(names: tuple[str, ...]) -> None:
    """Run the proofs NAMES, or all of them."""
    failed = []
    for name in names or PROOFS:
        click.echo(f"== {name}: {PROOFS[name].shows}")
        if not _run(name, PROOFS[name]):
            failed.append(name)
    if failed:
        click.echo(f"failed: {', '.join(failed)}", err=True)
        raise SystemExit(1)
    click.echo("prove: all passed")


if __name__ == "__main__":
    main()
