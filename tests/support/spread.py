"""How long a revocation takes to reach verifiers: revoke, and ask each of them when it refused the token.

"Durable" is measured by what comes before it: `created_at`, which PostgreSQL writes inside of the transaction. So what
is measured has the commit in it, and is never too short. All clocks are those of one host.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from carnet import Identity
from carnet.tls import secure_channel
from carnet.v1 import token_pb2, token_pb2_grpc
from support.child_lines import Child, child
from support.fleet import Fleet
from support.running_broker import BROKER_NAME, ORDERS, PAYMENTS

__all__ = ["Callers", "Spread", "callers", "milliseconds", "revoke_one_by_one", "together", "verifier_processes"]

_WITHIN: Final = 10.0


@dataclass
class Spread:
    """What was measured, in seconds, over all revocations and all verifiers."""

    from_created: list[float] = field(default_factory=list)
    """From the moment that the store wrote, inside of the transaction, to the refusal."""
    from_returned: list[float] = field(default_factory=list)
    """From the moment that the call returned; below zero where a verifier was sooner."""
    call: list[float] = field(default_factory=list)
    """How long the call took."""
    revoked: list[str] = field(default_factory=list)
    """The tokens."""

    def figures(self) -> dict[str, Any]:
        """Return the figures for `support.measurements.record`."""
        return {
            "revocations": len(self.revoked),
            "refusals": len(self.from_created),
            "durable_to_refused_ms": milliseconds(self.from_created),
            "returned_to_refused_ms": milliseconds(self.from_returned),
            "revoke_call_ms": milliseconds(self.call),
        }


class Callers:
    """Connections of one workload to all replicas, and one to the store."""

    def __init__(self, fleet: Fleet, stack: ExitStack, identity: Identity) -> None:
        self.identity = identity
        self._fleet = fleet
        self._rng = random.Random(1)  # noqa: S311 - picks a replica, guards nothing
        self._stubs = [
            token_pb2_grpc.TokenServiceStub(
                stack.enter_context(
                    secure_channel(target, identity=identity, ca_pem=fleet.ca.root_pem, server_name=BROKER_NAME)
                )
            )
            for target in fleet.targets("tokens")
        ]
        self._connection = stack.enter_context(fleet.postgres.connect(fleet.database))

    def issue(self) -> str:
        """Return a new token, from any replica."""
        request = token_pb2.IssueTokenRequest(audience="payments")
        request.ttl.FromSeconds(600)
        return str(self._rng.choice(self._stubs).IssueToken(request, timeout=5).token)

    def revoke(self, token: str) -> int:
        """Revoke a token through any replica, and return the version."""
        request = token_pb2.RevokeTokenRequest(token=token)
        return int(self._rng.choice(self._stubs).RevokeToken(request, timeout=5).revocation_version)

    def created_at(self, version: int) -> float:
        """Return when the store wrote a revocation, on the monotonic clock."""
        row = self._connection.execute("SELECT created_at FROM revocations WHERE version = %s", (version,)).fetchone()
        assert row is not None, f"the store has no revocation {version}"
        return int(row[0]) / 1_000_000 - (time.time() - time.monotonic())

    def pause(self) -> None:
        """Let a moment pass, so that revocations do not fall into step with anything."""
        time.sleep(self._rng.uniform(0.0, 0.05))


@contextmanager
def callers(fleet: Fleet) -> Iterator[Callers]:
    """Open the connections for the length of the block."""
    with ExitStack() as stack:
        yield Callers(fleet, stack, fleet.identity(ORDERS))


@contextmanager
def verifier_processes(
    fleet: Fleet,
    identity: Identity,
    *,
    verifiers: int,
    processes: int,
    issues_per_second: float,
    verifies_per_second: float,
) -> Iterator[Sequence[Child]]:
    """Run verifiers in a few processes. `identity` is that of the caller whose tokens they verify."""
    files = {"caller": identity, "service": fleet.identity(PAYMENTS)}
    settings: dict[str, Any] = {"ca_file": str(fleet.ca_file), "trust": fleet.targets("trust")}
    for name, one in files.items():
        for part, pem in (("certificate", one.certificate_chain_pem), ("key", one.private_key_pem)):
            path = fleet.directory / f"{name}-{part}.pem"
            path.touch(mode=0o600)
            path.write_bytes(pem)
            settings[f"{name}_{part}"] = str(path)
    settings |= {
        "tokens": fleet.targets("tokens"),
        "issues_per_second": issues_per_second / processes / len(fleet),
        "verifies_per_second": verifies_per_second / processes,
    }
    with ExitStack() as stack:
        yield [
            stack.enter_context(child("support.verifier_process", verifiers=verifiers // processes, **settings))
            for _ in range(processes)
        ]


def together(children: Sequence[Child], **question: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - any JSON
    """Ask all processes the same, at the same time."""
    return [future.result() for future in [one.begin(**question) for one in children]]


def revoke_one_by_one(calls: Callers, children: Sequence[Child], revocations: int) -> Spread:
    """Revoke tokens that every verifier accepts, one after the other, and wait each time until every one refuses."""
    spread = Spread()
    versions: list[tuple[int, float, list[float]]] = []
    for _ in range(revocations):
        token = calls.issue()
        together(children, do="expect", token=token)
        calls.pause()
        begun = time.monotonic()
        version = calls.revoke(token)
        returned = time.monotonic()
        answers = together(children, do="refused", within=_WITHIN)
        late = [status for answer in answers for status in answer.get("late", ())]
        assert not late, f"not refused within {_WITHIN} s of revocation {version}: {late}"
        spread.call.append(returned - begun)
        spread.revoked.append(token)
        versions.append((version, returned, [at for answer in answers for at in answer["at"]]))
    for version, returned, refused in versions:
        created = calls.created_at(version)
        spread.from_created += [at - created for at in refused]
        spread.from_returned += [at - returned for at in refused]
    return spread


def milliseconds(seconds: Sequence[float]) -> Mapping[str, float]:
    """Return the median, the 99th percentile and the maximum."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    named = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(1000 * ordered[round(part * last)], 1) for name, part in named.items()}
