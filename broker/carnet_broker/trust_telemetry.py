"""Logs and metrics of the trust stream and of the shared store. Part of `telemetry.Telemetry`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from carnet.errors import CarnetError
from carnet_broker.ports import LogPosition
from carnet_broker.store_parts import Claim

__all__ = ["TrustTelemetry"]

_CAUSES_LOGGED: Final = 20
_PUSH_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)


class TrustTelemetry:
    """What is counted and logged of streams and store. Thread-safe."""

    def __init__(self, registry: CollectorRegistry, log: Any) -> None:  # noqa: ANN401 - structlog's loggers have no class
        self._log = log
        self._failures: set[str] = set()
        self.stream_count = Gauge(
            "carnet_trust_streams", "Verifiers that are being told of changes.", registry=registry
        )
        self.pushes = Counter(
            "carnet_trust_pushes_total", "Responses sent to verifiers, by what they tell.", ["kind"], registry=registry
        )
        self.push_seconds = Histogram(
            "carnet_trust_push_seconds",
            "From a change being known here to its being sent to a verifier.",
            registry=registry,
            buckets=_PUSH_BUCKETS,
        )
        self.revocation_version = Gauge(
            "carnet_revocation_version", "Version of the last revocation applied here.", registry=registry
        )
        self.revocations = Gauge("carnet_revocations_in_force", "Revocations in force.", registry=registry)
        self.age = Gauge(
            "carnet_trust_age_seconds",
            "How long ago the keyring and the shared store were read, whichever is longer ago.",
            registry=registry,
        )
        self.store_ok = Gauge("carnet_store_reachable", "1 while the shared store answers, else 0.", registry=registry)
        self.store_failures = Counter(
            "carnet_store_failures_total", "Rounds with the shared store that failed.", registry=registry
        )
        self.restored = Counter(
            "carnet_store_restored_total",
            "Times that the shared store was found behind what had been seen of it.",
            registry=registry,
        )
        self.clock_offset = Gauge(
            "carnet_store_clock_offset_seconds",
            "How far the clock of this host is from the store's, at least.",
            registry=registry,
        )
        self.replicas = Gauge("carnet_live_replicas", "Brokers whose lease has not ended.", registry=registry)
        self.verifiers = Gauge("carnet_live_verifiers", "Live verifiers of all brokers.", registry=registry)
        self.unrecorded = Counter(
            "carnet_revocations_unrecorded_total",
            "Revocations that hold and are not on the audit record.",
            registry=registry,
        )
        self.sessions_left = Counter(
            "carnet_verifiers_left_total", "Verifiers that left, by why.", ["reason"], registry=registry
        )

    def show_age(self, age: Callable[[], float]) -> None:
        """Show what `age` returns, in seconds, whenever the metrics are read."""
        self.age.set_function(age)

    # -- streams (edges.grpc.watch.StreamEvents) ---------------------------------------------------------------------

    def streams(self, count: int) -> None:
        """Show how many streams there are."""
        self.stream_count.set(count)

    def pushed(self, kind: str, seconds: float | None) -> None:
        """Count a response, and how long after the change it was sent."""
        self.pushes.labels(kind).inc()
        if seconds is not None:
            self.push_seconds.observe(seconds)

    def left(self, reason: str) -> None:
        """Count a verifier that left."""
        self.sessions_left.labels(reason).inc()

    # -- store (store_loop.StoreEvents) ------------------------------------------------------------------------------

    def store_answered(self) -> None:
        """Note that the store answers, and say so where it did not before."""
        if self._failures:
            self._log.info("store_recovered")
        self._failures.clear()
        self.store_ok.set(1)

    def store_failed(self, error: Exception) -> None:
        """Note that a round failed; log that once, and each other cause until it recovers once as well."""
        self.store_ok.set(0)
        self.store_failures.inc()
        cause = str(error) if error.__cause__ is None else f"{error}: {error.__cause__}"
        if cause not in self._failures and len(self._failures) < _CAUSES_LOGGED:
            self._log.error("store_failed", cause=cause, exc_info=None if isinstance(error, CarnetError) else error)
            self._failures.add(cause)

    def store_restored(self, claim: Claim, found: LogPosition) -> None:
        """Count and log that the store is behind what was seen of it, and by whom: an alarm."""
        self.restored.inc()
        self._log.error(
            "store_restored",
            claimed_by=claim.by,
            seen_epoch=claim.position.epoch,
            seen_version=claim.position.version,
            found_epoch=found.epoch,
            found_version=found.version,
        )

    def revocations_read(self, position: LogPosition, count: int) -> None:
        """Show how far this replica is in the log."""
        self.revocation_version.set(position.version)
        self.revocations.set(count)

    def revocation_unrecorded(self, error: CarnetError) -> None:
        """Count and log a revocation that is not on the audit record."""
        self.unrecorded.inc()
        self._log.error("revocation_unrecorded", cause=str(error))

    def verifiers_counted(self, live: int) -> None:
        """Show how many verifiers are live, of all brokers."""
        self.verifiers.set(live)

    def lease_renewed(self, *, live_replicas: int, clock_offset: float) -> None:
        """Show what the store said of the brokers, and how far its clock is from ours, in seconds."""
        self.replicas.set(live_replicas)
        self.clock_offset.set(clock_offset)
