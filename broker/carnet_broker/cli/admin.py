"""What the commands that speak to a broker's admin port share: option, exit codes, and how they tell of things."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Final, ParamSpec, TypeVar

import click

from carnet_broker.cli.output import complain
from carnet_broker.cli.spans import about, moment_and_distance
from carnet_broker.edges.grpc.admin_client import AdminRefusedError, AdminUnavailableError, Status, VerifierSeen

__all__ = [
    "NOT_KNOWN",
    "NOT_YET",
    "REFUSED",
    "admin_errors",
    "admin_option",
    "status_lines",
    "status_to_json",
    "told_verifiers",
    "verifier_to_json",
]

NOT_KNOWN: Final = 1
"""The broker could not be asked, or could not do it now."""
REFUSED: Final = 3
"""The broker refuses: the caller is no admin, or there is no such key."""
NOT_YET: Final = 4
"""Not every live verifier has it in time."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

admin_option = click.option(
    "--admin", metavar="HOST:PORT", help="The broker's admin port.  [env var: CARNET_ADMIN]", default=None
)


def admin_errors(command: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Turn what the broker refuses, or cannot do now, into one line and its exit code."""

    @functools.wraps(command)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return command(*args, **kwargs)
        except AdminRefusedError as error:
            complain(error)
            raise SystemExit(REFUSED) from None
        except AdminUnavailableError as error:
            complain(error)
            raise SystemExit(NOT_KNOWN) from None

    return guarded


def told_verifiers(verifiers: Iterable[VerifierSeen]) -> Iterator[str]:
    """Say of each verifier which it is and what it has."""
    for one in verifiers:
        yield (
            f"{one.spiffe_id} {one.instance_id}: generation {one.generation},"
            f" revocations up to {one.revocation_version}"
        )


def verifier_to_json(verifier: VerifierSeen) -> dict[str, Any]:
    """Return a verifier as JSON tells of it."""
    return {
        "spiffe_id": verifier.spiffe_id,
        "instance_id": verifier.instance_id,
        "replica_id": verifier.replica_id,
        "generation": verifier.generation,
        "revocation_version": verifier.revocation_version,
        "acknowledged_ago_seconds": verifier.acknowledged_ago.total_seconds(),
        "lagging": verifier.lagging,
    }


def status_lines(status: Status) -> Iterator[str]:
    """Tell of brokers, verifiers and rotation, to people."""
    yield (
        f"brokers: this one is at generation {status.generation}, revocations up to {status.revocation_version}"
        f" (epoch {status.epoch})"
    )
    for replica in status.replicas:
        state = "" if replica.live else "  ENDED"
        yield (
            f"  {replica.replica_id}  version {replica.version}, generation {replica.generation}, revocations up to"
            f" {replica.revocation_version}, said so {about(replica.renewed_ago)} ago{state}"
        )
    rollout = status.rollout
    if rollout is not None:
        now = datetime.now(UTC)
        permitted = "permitted" if rollout.permitted else f"{rollout.missing} live verifiers have not loaded it"
        window = rollout.window_ends
        told = [permitted]
        told.append("a live broker has not loaded it" if window is None else _when("window for pollers", window, now))
        if rollout.deadline is not None and not rollout.permitted:
            told.append(_when("deadline", rollout.deadline, now))
        yield f"standby: {rollout.kid} as generation {rollout.generation}: {', '.join(told)}"
    yield f"verifiers: {status.live_verifiers} live"
    for verifier, line in zip(status.verifiers, told_verifiers(status.verifiers), strict=True):
        yield f"  {'LAGS    ' if verifier.lagging else '        '} {line}"


def _when(what: str, at: datetime, now: datetime) -> str:
    return f"{what} {'ended' if at <= now else 'ends'} {moment_and_distance(at, now)}"


def status_to_json(status: Status) -> dict[str, Any]:
    """Return the status as JSON tells of it."""
    rollout = status.rollout
    return {
        "position": {
            "epoch": status.epoch,
            "generation": status.generation,
            "revocation_version": status.revocation_version,
        },
        "replicas": [
            {
                "replica_id": one.replica_id,
                "version": one.version,
                "generation": one.generation,
                "revocation_version": one.revocation_version,
                "renewed_ago_seconds": one.renewed_ago.total_seconds(),
                "live": one.live,
            }
            for one in status.replicas
        ],
        "live_verifiers": status.live_verifiers,
        "verifiers": [verifier_to_json(one) for one in status.verifiers],
        "rollout": None
        if rollout is None
        else {
            "kid": rollout.kid,
            "generation": rollout.generation,
            "permitted": rollout.permitted,
            "missing": rollout.missing,
            "deadline": None if rollout.deadline is None else rollout.deadline.isoformat(),
            "window_ends": None if rollout.window_ends is None else rollout.window_ends.isoformat(),
        },
    }
